/* dev.edgelab.Native: the Java side of edge_runtime.h. Methods are registered by hand in JNI_OnLoad, so a name or a signature that does
 * not fit the Java class fails when the library is loaded, and not at the first call. Every failure leaves as a Java exception. */
#include <jni.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

#include "edge_runtime.h"

#define COUNT(array) ((jint)(sizeof(array) / sizeof *(array)))

static jclass native_class;   /* a global reference, held as long as the library */
static jmethodID failure;     /* static Throwable failure(int code, byte[] utf8) */

/* Throws what Native.failure makes of `error`. Text travels as bytes: JNI's own strings are not quite UTF-8. */
static void throw_error(JNIEnv *env, const EdgeError *error) {
    jsize length = 0;
    while (error->message[length] != 0) length++;
    jbyteArray text = (*env)->NewByteArray(env, length);
    if (text == NULL) return; /* an OutOfMemoryError is under way */
    (*env)->SetByteArrayRegion(env, text, 0, length, (const jbyte *)error->message);
    jobject thrown = (*env)->CallStaticObjectMethod(env, native_class, failure, (jint)error->code, text);
    if (thrown != NULL && !(*env)->ExceptionCheck(env)) (*env)->Throw(env, thrown);
    (*env)->DeleteLocalRef(env, text);
}

static void throw_no_memory(JNIEnv *env) {
    EdgeError error = {EDGE_NO_MEMORY, "no memory for the arguments"};
    throw_error(env, &error);
}

static EdgeSession *session_of(jlong handle) { return (EdgeSession *)(intptr_t)handle; }

/* A copy of `bytes` with a 0 behind; NULL with an exception under way. */
static char *text_of(JNIEnv *env, jbyteArray bytes) {
    jsize length = (*env)->GetArrayLength(env, bytes);
    char *text = malloc((size_t)length + 1);
    if (text == NULL) {
        throw_no_memory(env);
        return NULL;
    }
    (*env)->GetByteArrayRegion(env, bytes, 0, length, (jbyte *)text);
    text[length] = 0;
    return text;
}

/* A copy of `values`; NULL with an exception under way. */
static int64_t *longs_of(JNIEnv *env, jlongArray values) {
    jsize length = (*env)->GetArrayLength(env, values);
    int64_t *copy = malloc(((size_t)length + 1) * sizeof *copy);
    if (copy == NULL) {
        throw_no_memory(env);
        return NULL;
    }
    (*env)->GetLongArrayRegion(env, values, 0, length, (jlong *)copy);
    return copy;
}

static jstring start(JNIEnv *env, jclass type, jbyteArray library) {
    (void)type;
    EdgeError error = {0};
    char *name = library ? text_of(env, library) : NULL;
    if (library != NULL && name == NULL) return NULL;
    const char *version = edge_start(name, &error);
    free(name);
    if (version == NULL) {
        throw_error(env, &error);
        return NULL;
    }
    return (*env)->NewStringUTF(env, version);
}

static jlong open_session(JNIEnv *env, jclass type, jbyteArray path, jint threads, jboolean language) {
    (void)type;
    EdgeError error = {0};
    char *name = text_of(env, path);
    if (name == NULL) return 0;
    EdgeSession *session = edge_open(name, threads, &error);
    free(name);
    if (session != NULL && language && !edge_is_language_model(session, &error)) {
        edge_close(session);
        session = NULL;
    }
    if (session == NULL) throw_error(env, &error);
    return (jlong)(intptr_t)session;
}

static void close_session(JNIEnv *env, jclass type, jlong handle) {
    (void)env, (void)type;
    edge_close(session_of(handle));
}

static jlong vocabulary(JNIEnv *env, jclass type, jlong handle) {
    (void)env, (void)type;
    return (jlong)edge_vocabulary(session_of(handle));
}

static jlong past(JNIEnv *env, jclass type, jlong handle) {
    (void)env, (void)type;
    return (jlong)edge_past(session_of(handle));
}

static void forget(JNIEnv *env, jclass type, jlong handle) {
    (void)env, (void)type;
    edge_forget(session_of(handle));
}

/* 1 when `ids`, rows of equal length, were read; else an exception is under way. */
static int feed_ids(JNIEnv *env, jlong handle, jlongArray ids, jlongArray mask, jint rows) {
    EdgeError error = {0};
    size_t count = (size_t)(*env)->GetArrayLength(env, ids);
    if (rows < 1 || count % (size_t)rows != 0 ||
        (mask && (*env)->GetArrayLength(env, mask) != edge_past(session_of(handle)) * rows + (jlong)count)) {
        error = (EdgeError){EDGE_BAD_ARGUMENT, "ids and mask do not fill the rows"};
        throw_error(env, &error);
        return 0;
    }
    int64_t *words = longs_of(env, ids), *flags = NULL;
    int done = words != NULL;
    if (done && mask != NULL) done = (flags = longs_of(env, mask)) != NULL;
    if (done) {
        done = edge_feed(session_of(handle), words, flags, (size_t)rows, count / (size_t)rows, &error);
        if (!done) throw_error(env, &error);
    }
    free(words), free(flags);
    return done;
}

/* Logits of the last position of each row, [rows, vocabulary], or with `all` of each position. */
static jfloatArray feed(JNIEnv *env, jclass type, jlong handle, jlongArray ids, jlongArray mask, jint rows, jboolean all) {
    (void)type;
    if (!feed_ids(env, handle, ids, mask, rows)) return NULL;
    int64_t shape[EDGE_MAX_RANK];
    size_t rank;
    const float *logits = edge_output(session_of(handle), shape, &rank);
    int64_t n = shape[1], width = shape[2], kept = all ? n : 1;
    if (shape[0] * kept > INT32_MAX / width) {
        EdgeError error = {EDGE_BAD_ARGUMENT, "the logits of so many tokens do not fit a Java array; ask for the last position only"};
        throw_error(env, &error);
        return NULL;
    }
    jfloatArray result = (*env)->NewFloatArray(env, (jsize)(shape[0] * kept * width));
    if (result == NULL) return NULL;
    for (int64_t row = 0; row < shape[0]; row++)
        (*env)->SetFloatArrayRegion(env, result, (jsize)(row * kept * width), (jsize)(kept * width), logits + (row * n + n - kept) * width);
    return result;
}

/* The likeliest token after `ids`, the first of equals. No logits pass into Java. */
static jlong next(JNIEnv *env, jclass type, jlong handle, jlongArray ids) {
    (void)type;
    if (!feed_ids(env, handle, ids, NULL, 1)) return -1;
    int64_t shape[EDGE_MAX_RANK];
    size_t rank;
    const float *logits = edge_output(session_of(handle), shape, &rank);
    const float *last = logits + (shape[1] - 1) * shape[2];
    int64_t best = 0;
    for (int64_t i = 1; i < shape[2]; i++)
        if (last[i] > last[best]) best = i;
    if (!isfinite(last[best])) {
        EdgeError error = {EDGE_WRONG_MODEL, "the logits are not finite numbers"};
        throw_error(env, &error);
        return -1;
    }
    return (jlong)best;
}

static jlongArray input_shape(JNIEnv *env, jclass type, jlong handle) {
    (void)type;
    EdgeError error = {0};
    int64_t shape[EDGE_MAX_RANK];
    size_t rank = EDGE_MAX_RANK;
    if (!edge_input_shape(session_of(handle), shape, &rank, &error)) {
        throw_error(env, &error);
        return NULL;
    }
    jlongArray result = (*env)->NewLongArray(env, (jsize)rank);
    if (result != NULL) (*env)->SetLongArrayRegion(env, result, 0, (jsize)rank, (const jlong *)shape);
    return result;
}

static jfloatArray run(JNIEnv *env, jclass type, jlong handle, jfloatArray input, jlongArray sizes) {
    (void)type;
    EdgeError error = {0};
    jsize count = (*env)->GetArrayLength(env, input), rank = (*env)->GetArrayLength(env, sizes);
    float *values = malloc(((size_t)count + 1) * sizeof *values);
    int64_t *shape = longs_of(env, sizes);
    jfloatArray result = NULL;
    if (values == NULL || shape == NULL) {
        if (shape != NULL) throw_no_memory(env);
    } else {
        (*env)->GetFloatArrayRegion(env, input, 0, count, values);
        if (!edge_run(session_of(handle), values, (size_t)count, shape, (size_t)rank, &error)) {
            throw_error(env, &error);
        } else {
            int64_t given[EDGE_MAX_RANK];
            size_t dimensions;
            const float *output = edge_output(session_of(handle), given, &dimensions);
            int64_t volume = 1;
            for (size_t i = 0; i < dimensions; i++) volume = volume > INT32_MAX ? volume : volume * given[i];
            result = volume > INT32_MAX ? NULL : (*env)->NewFloatArray(env, (jsize)volume);
            if (result != NULL) (*env)->SetFloatArrayRegion(env, result, 0, (jsize)volume, output);
            else if (volume > INT32_MAX) throw_no_memory(env);
        }
    }
    free(values), free(shape);
    return result;
}

JNIEXPORT jint JNICALL JNI_OnLoad(JavaVM *vm, void *reserved) {
    (void)reserved;
    union { void (*any)(void); void *object; } f[10] = {
        {(void (*)(void))start}, {(void (*)(void))open_session}, {(void (*)(void))close_session}, {(void (*)(void))vocabulary},
        {(void (*)(void))past},  {(void (*)(void))forget},       {(void (*)(void))feed},          {(void (*)(void))next},
        {(void (*)(void))input_shape}, {(void (*)(void))run},
    };
    const JNINativeMethod methods[] = {
        {(char *)"start", (char *)"([B)Ljava/lang/String;", f[0].object},
        {(char *)"open", (char *)"([BIZ)J", f[1].object},
        {(char *)"close", (char *)"(J)V", f[2].object},
        {(char *)"vocabulary", (char *)"(J)J", f[3].object},
        {(char *)"past", (char *)"(J)J", f[4].object},
        {(char *)"forget", (char *)"(J)V", f[5].object},
        {(char *)"feed", (char *)"(J[J[JIZ)[F", f[6].object},
        {(char *)"next", (char *)"(J[J)J", f[7].object},
        {(char *)"inputShape", (char *)"(J)[J", f[8].object},
        {(char *)"run", (char *)"(J[F[J)[F", f[9].object},
    };
    JNIEnv *env = NULL;
    if ((*vm)->GetEnv(vm, (void **)&env, JNI_VERSION_1_6) != JNI_OK) return JNI_ERR;
    jclass type = (*env)->FindClass(env, "dev/edgelab/Native");
    if (type == NULL) return JNI_ERR;
    native_class = (*env)->NewGlobalRef(env, type);
    failure = (*env)->GetStaticMethodID(env, type, "failure", "(I[B)Ljava/lang/Throwable;");
    if (native_class == NULL || failure == NULL) return JNI_ERR;
    if ((*env)->RegisterNatives(env, type, methods, COUNT(methods)) != JNI_OK) return JNI_ERR;
    return JNI_VERSION_1_6;
}
