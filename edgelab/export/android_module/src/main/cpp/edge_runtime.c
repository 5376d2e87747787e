#include "edge_runtime.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ort_slots.h"

/* Opset 20, which edgelab writes, needs ONNX Runtime 1.17; the table's order is promised within major version 1. */
enum { ORT_MAJOR = 1, ORT_MINOR_AT_LEAST = 17 };

static const OrtSlot *table;
static const char *version;
#define ORT(name) ((Ort_##name)table[ORT_ROW_##name])

typedef struct Tensor { /* of the model's inputs and outputs, as its file states them */
    char *name;
    int type; /* an element type; 0 for what is no tensor */
    size_t rank;
    int64_t shape[EDGE_MAX_RANK]; /* -1 where any size will do */
} Tensor;

struct EdgeSession {
    OrtEnv *env;
    OrtSession *session;
    OrtMemoryInfo *memory;
    OrtAllocator *allocator; /* the runtime's own: never released */
    size_t input_count, output_count;
    Tensor *inputs, *outputs;

    /* a language model: values 0 and 1 of what is given are input_ids and attention_mask, 0 of what is got is logits */
    EdgeError unfit; /* code 0: it is one */
    size_t pasts;
    const char **given_names, **got_names; /* [2 + pasts], [1 + pasts], borrowed from inputs and outputs */
    size_t *past_input;                    /* [pasts] index into inputs */
    OrtValue **past;                       /* [pasts], all NULL before the first token */
    int64_t length, rows;

    OrtValue *output;
    float *data;
    size_t rank;
    int64_t shape[EDGE_MAX_RANK];
};

static int fail(EdgeError *error, int code, const char *format, ...) {
    va_list arguments;
    error->code = code;
    va_start(arguments, format);
    vsnprintf(error->message, sizeof error->message, format, arguments);
    va_end(arguments);
    return 0;
}

/* 1 if `status` is well; else 0, with its words in `error`. The status is released either way. */
static int well(OrtStatus *status, EdgeError *error) {
    if (status == NULL) return 1;
    int code = ORT(GetErrorCode)(status);
    fail(error, code ? code : 1, "%s", ORT(GetErrorMessage)(status));
    ORT(ReleaseStatus)(status);
    return 0;
}

#ifdef EDGE_ORT_LINKED
extern const OrtApiBase *OrtGetApiBase(void);
#endif

const char *edge_start(const char *library, EdgeError *error) {
    if (table != NULL) return version;
    const OrtApiBase *base = NULL;
#ifdef EDGE_ORT_LINKED
    (void)library;
    base = OrtGetApiBase();
#else
    void *handle = library ? dlopen(library, RTLD_NOW | RTLD_LOCAL) : NULL;
    if (handle == NULL) {
        fail(error, EDGE_NO_RUNTIME, "%s", library ? dlerror() : "no library of ONNX Runtime is named");
        return NULL;
    }
    union { void *object; const OrtApiBase *(*function)(void); } get; /* POSIX promises that the two have one form */
    get.object = dlsym(handle, "OrtGetApiBase");
    if (get.object != NULL) base = get.function();
#endif
    int major = 0, minor = 0;
    const char *found = base ? base->GetVersionString() : NULL;
    if (found == NULL || sscanf(found, "%d.%d", &major, &minor) != 2 || major != ORT_MAJOR || minor < ORT_MINOR_AT_LEAST) {
        fail(error, EDGE_NO_RUNTIME, "ONNX Runtime %s is not one that this program knows; it needs %d.%d or a later %d.x",
             found ? found : "(without a version)", ORT_MAJOR, ORT_MINOR_AT_LEAST, ORT_MAJOR);
        return NULL;
    }
    const OrtSlot *slots = base->GetApi(1);
    if (slots == NULL) {
        fail(error, EDGE_NO_RUNTIME, "ONNX Runtime %s does not offer version 1 of its interface", found);
        return NULL;
    }
    version = found;
    table = slots;
    return version;
}

/* ------------------------------------------------------------------------------------------------- what the file states */

static int read_info(const OrtTensorInfo *info, int *type, size_t *rank, int64_t *shape, EdgeError *error) {
    if (!well(ORT(GetTensorElementType)(info, type), error) || !well(ORT(GetDimensionsCount)(info, rank), error)) return 0;
    if (*rank > EDGE_MAX_RANK)
        return fail(error, EDGE_WRONG_MODEL, "a tensor has %zu dimensions; %d at most are read", *rank, EDGE_MAX_RANK);
    return well(ORT(GetDimensions)(info, shape, *rank), error);
}

static int describe(EdgeSession *s, int is_input, size_t index, Tensor *t, EdgeError *error) {
    char *name = NULL;
    OrtTypeInfo *info = NULL;
    const OrtTensorInfo *tensor = NULL;
    OrtStatus *status = is_input ? ORT(SessionGetInputName)(s->session, index, s->allocator, &name)
                                 : ORT(SessionGetOutputName)(s->session, index, s->allocator, &name);
    if (!well(status, error)) return 0;
    size_t length = strlen(name) + 1;
    t->name = malloc(length);
    if (t->name != NULL) memcpy(t->name, name, length);
    if (!well(ORT(AllocatorFree)(s->allocator, name), error)) return 0;
    if (t->name == NULL) return fail(error, EDGE_NO_MEMORY, "no memory for a name");
    status = is_input ? ORT(SessionGetInputTypeInfo)(s->session, index, &info) : ORT(SessionGetOutputTypeInfo)(s->session, index, &info);
    if (!well(status, error)) return 0;
    int done = well(ORT(CastTypeInfoToTensorInfo)(info, &tensor), error);
    if (done && tensor != NULL) done = read_info(tensor, &t->type, &t->rank, t->shape, error);
    ORT(ReleaseTypeInfo)(info);
    return done;
}

static int describe_all(EdgeSession *s, EdgeError *error) {
    if (!well(ORT(SessionGetInputCount)(s->session, &s->input_count), error)) return 0;
    if (!well(ORT(SessionGetOutputCount)(s->session, &s->output_count), error)) return 0;
    s->inputs = calloc(s->input_count + 1, sizeof *s->inputs);
    s->outputs = calloc(s->output_count + 1, sizeof *s->outputs);
    if (s->inputs == NULL || s->outputs == NULL) return fail(error, EDGE_NO_MEMORY, "no memory for the model's names");
    for (size_t i = 0; i < s->input_count; i++)
        if (!describe(s, 1, i, &s->inputs[i], error)) return 0;
    for (size_t i = 0; i < s->output_count; i++)
        if (!describe(s, 0, i, &s->outputs[i], error)) return 0;
    return 1;
}

static const Tensor *named(const Tensor *tensors, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (strcmp(tensors[i].name, name) == 0) return &tensors[i];
    return NULL;
}

/* Finds the parts of a language model by their names; what is missing is written to s->unfit. 0 only when memory ran out. */
static int find_language_model(EdgeSession *s, EdgeError *error) {
    static const char prefix[] = "past_key_values.";
    s->given_names = calloc(s->input_count + 2, sizeof *s->given_names);
    s->got_names = calloc(s->output_count + 1, sizeof *s->got_names);
    s->past_input = calloc(s->input_count + 1, sizeof *s->past_input);
    s->past = calloc(s->input_count + 1, sizeof *s->past);
    if (!s->given_names || !s->got_names || !s->past_input || !s->past)
        return fail(error, EDGE_NO_MEMORY, "no memory for the model's names");
    const Tensor *ids = named(s->inputs, s->input_count, "input_ids"), *mask = named(s->inputs, s->input_count, "attention_mask");
    const Tensor *logits = named(s->outputs, s->output_count, "logits");
    if (!ids || ids->type != ORT_INT64 || !mask || mask->type != ORT_INT64) {
        fail(&s->unfit, EDGE_WRONG_MODEL,
             "the model has no int64 inputs input_ids and attention_mask: it is no language model with a cache");
        return 1;
    }
    if (!logits || logits->type != ORT_FLOAT || logits->rank != 3 || logits->shape[2] < 1) {
        fail(&s->unfit, EDGE_WRONG_MODEL, "the model has no float output logits [batch, sequence, vocabulary]");
        return 1;
    }
    s->given_names[0] = ids->name, s->given_names[1] = mask->name, s->got_names[0] = logits->name;
    for (size_t i = 0; i < s->input_count; i++) {
        const Tensor *t = &s->inputs[i];
        if (t == ids || t == mask) continue;
        char present[256];
        snprintf(present, sizeof present, "present.%s", strncmp(t->name, prefix, sizeof prefix - 1) ? "" : t->name + sizeof prefix - 1);
        const Tensor *after = named(s->outputs, s->output_count, present);
        if (after == NULL || after->type != ORT_FLOAT || t->type != ORT_FLOAT || t->rank != 4 || t->shape[1] < 1 || t->shape[3] < 1) {
            fail(&s->unfit, EDGE_WRONG_MODEL,
                 "input %.80s is no past_key_values.* float [batch, heads, past, width] with an output present.* of its own", t->name);
            return 1;
        }
        s->given_names[2 + s->pasts] = t->name;
        s->got_names[1 + s->pasts] = after->name;
        s->past_input[s->pasts++] = i;
    }
    if (s->pasts == 0) fail(&s->unfit, EDGE_WRONG_MODEL, "the model has no past_key_values.* inputs; export it with cache=True");
    return 1;
}

/* ------------------------------------------------------------------------------------------------------ open and close */

EdgeSession *edge_open(const char *path, int threads, EdgeError *error) {
    OrtSessionOptions *options = NULL;
    if (table == NULL) {
        fail(error, EDGE_NO_RUNTIME, "edge_start was not called, or failed");
        return NULL;
    }
    if (threads < 0 || threads > 256) {
        fail(error, EDGE_BAD_ARGUMENT, "threads=%d is not between 0 (the runtime's choice) and 256", threads);
        return NULL;
    }
    EdgeSession *s = calloc(1, sizeof *s);
    if (s == NULL) {
        fail(error, EDGE_NO_MEMORY, "no memory for a session");
        return NULL;
    }
    int done = well(ORT(CreateEnv)(ORT_LOG_ERROR, "edgelab", &s->env), error) &&
               well(ORT(GetAllocatorWithDefaultOptions)(&s->allocator), error) &&
               well(ORT(CreateCpuMemoryInfo)(ORT_DEVICE_ALLOCATOR, ORT_MEMORY_DEFAULT, &s->memory), error) &&
               well(ORT(CreateSessionOptions)(&options), error) &&
               well(ORT(SetSessionGraphOptimizationLevel)(options, ORT_OPTIMIZE_ALL), error) &&
               well(ORT(SetIntraOpNumThreads)(options, threads), error) && well(ORT(SetInterOpNumThreads)(options, 1), error) &&
               well(ORT(CreateSession)(s->env, path, options, &s->session), error);
    if (options != NULL) ORT(ReleaseSessionOptions)(options);
    if (done && describe_all(s, error) && find_language_model(s, error)) return s;
    edge_close(s);
    return NULL;
}

static void drop_output(EdgeSession *s) {
    if (s->output != NULL) ORT(ReleaseValue)(s->output);
    s->output = NULL, s->data = NULL, s->rank = 0;
}

void edge_forget(EdgeSession *s) {
    drop_output(s);
    for (size_t i = 0; i < s->pasts; i++) {
        if (s->past[i] != NULL) ORT(ReleaseValue)(s->past[i]);
        s->past[i] = NULL;
    }
    s->length = s->rows = 0;
}

void edge_close(EdgeSession *s) {
    if (s == NULL) return;
    edge_forget(s);
    for (size_t i = 0; s->inputs && i < s->input_count; i++) free(s->inputs[i].name);
    for (size_t i = 0; s->outputs && i < s->output_count; i++) free(s->outputs[i].name);
    free(s->inputs), free(s->outputs), free(s->given_names), free(s->got_names), free(s->past_input), free(s->past);
    if (s->session != NULL) ORT(ReleaseSession)(s->session);
    if (s->memory != NULL) ORT(ReleaseMemoryInfo)(s->memory);
    if (s->env != NULL) ORT(ReleaseEnv)(s->env);
    free(s);
}

/* ---------------------------------------------------------------------------------------------------- a language model */

int edge_is_language_model(const EdgeSession *s, EdgeError *error) {
    if (s->unfit.code != 0) *error = s->unfit;
    return s->unfit.code == 0;
}

int64_t edge_vocabulary(const EdgeSession *s) { return s->unfit.code ? 0 : named(s->outputs, s->output_count, "logits")->shape[2]; }

int64_t edge_past(const EdgeSession *s) { return s->length; }

/* The data and shape of a fresh output, kept for edge_output. */
static int keep_output(EdgeSession *s, OrtValue *value, EdgeError *error) {
    OrtTensorInfo *info = NULL;
    void *data = NULL;
    int type = 0;
    drop_output(s);
    s->output = value;
    if (!well(ORT(GetTensorTypeAndShape)(value, &info), error)) return 0;
    int done = read_info(info, &type, &s->rank, s->shape, error);
    ORT(ReleaseTensorTypeAndShapeInfo)(info);
    if (!done) return 0;
    if (type != ORT_FLOAT) return fail(error, EDGE_WRONG_MODEL, "the output has element type %d; float (%d) is read", type, ORT_FLOAT);
    if (!well(ORT(GetTensorMutableData)(value, &data), error)) return 0;
    s->data = data;
    return 1;
}

static int check_ids(const EdgeSession *s, const int64_t *ids, size_t rows, size_t n, EdgeError *error) {
    int64_t vocabulary = edge_vocabulary(s);
    if (s->unfit.code != 0) return fail(error, s->unfit.code, "%s", s->unfit.message);
    if (rows < 1 || n < 1) return fail(error, EDGE_BAD_ARGUMENT, "no token ids are given; one at least is needed");
    if (rows > 4096 || n > INT32_MAX / 4096)
        return fail(error, EDGE_BAD_ARGUMENT, "%zu rows of %zu ids are more than can be read at once", rows, n);
    if (s->length > 0 && (int64_t)rows != s->rows)
        return fail(error, EDGE_BAD_ARGUMENT, "%zu rows of ids cannot go on after %lld; forget first", rows, (long long)s->rows);
    for (size_t i = 0; i < rows * n; i++)
        if (ids[i] < 0 || ids[i] >= vocabulary)
            return fail(error, EDGE_BAD_ARGUMENT, "token id %lld at %zu is not between 0 and %lld", (long long)ids[i], i,
                        (long long)vocabulary - 1);
    return 1;
}

/* One Run: given and got are [2 + pasts] and [1 + pasts], all NULL; what is made here stays in them for the caller to release. */
static int feed_once(EdgeSession *s, int64_t *ids, int64_t *mask, size_t rows, size_t n, OrtValue **given, OrtValue **got,
                     EdgeError *error) {
    int64_t shape[2] = {(int64_t)rows, (int64_t)n}, seen[2] = {(int64_t)rows, s->length + (int64_t)n};
    size_t words = rows * n, flags = rows * (size_t)seen[1];
    if (!well(ORT(CreateTensorWithDataAsOrtValue)(s->memory, ids, 8 * words, shape, 2, ORT_INT64, &given[0]), error)) return 0;
    if (!well(ORT(CreateTensorWithDataAsOrtValue)(s->memory, mask, 8 * flags, seen, 2, ORT_INT64, &given[1]), error)) return 0;
    for (size_t i = 0; i < s->pasts; i++) {
        if (s->past[i] == NULL) { /* before the first token: no columns */
            const int64_t *stated = s->inputs[s->past_input[i]].shape;
            int64_t empty[4] = {(int64_t)rows, stated[1], 0, stated[3]};
            if (!well(ORT(CreateTensorAsOrtValue)(s->allocator, empty, 4, ORT_FLOAT, &s->past[i]), error)) return 0;
        }
        given[2 + i] = s->past[i];
    }
    const OrtValue *const *inputs = (const OrtValue *const *)given;
    return well(ORT(Run)(s->session, NULL, s->given_names, inputs, 2 + s->pasts, s->got_names, 1 + s->pasts, got), error);
}

int edge_feed(EdgeSession *s, int64_t *ids, int64_t *mask, size_t rows, size_t n, EdgeError *error) {
    if (!check_ids(s, ids, rows, n, error)) return 0;
    size_t total = (size_t)s->length + n;
    int64_t *ones = mask ? NULL : malloc(rows * total * sizeof *ones);
    OrtValue **given = calloc(2 + s->pasts, sizeof *given), **got = calloc(1 + s->pasts, sizeof *got);
    int done = given && got && (mask || ones);
    if (!done) fail(error, EDGE_NO_MEMORY, "no memory for %zu tokens", rows * total);
    for (size_t i = 0; done && ones && i < rows * total; i++) ones[i] = 1;
    done = done && feed_once(s, ids, mask ? mask : ones, rows, n, given, got, error);
    for (size_t i = 0; given && i < 2; i++)
        if (given[i] != NULL) ORT(ReleaseValue)(given[i]);
    if (done) {
        for (size_t i = 0; i < s->pasts; i++) {
            ORT(ReleaseValue)(s->past[i]);
            s->past[i] = got[1 + i];
        }
        s->length += (int64_t)n, s->rows = (int64_t)rows;
        done = keep_output(s, got[0], error);
        if (done && (s->rank != 3 || s->shape[0] != (int64_t)rows || s->shape[1] != (int64_t)n || s->shape[2] != edge_vocabulary(s)))
            done = fail(error, EDGE_WRONG_MODEL, "the logits are not of shape [%zu, %zu, %lld]", rows, n, (long long)edge_vocabulary(s));
        if (!done) edge_forget(s);
    } else {
        for (size_t i = 0; got && i < 1 + s->pasts; i++)
            if (got[i] != NULL) ORT(ReleaseValue)(got[i]);
        if (s->length == 0) edge_forget(s); /* empty pasts are of this number of rows; the next may have another */
    }
    free(ones), free(given), free(got);
    return done;
}

/* --------------------------------------------------------------------------------------------------------------- a net */

int edge_input_shape(const EdgeSession *s, int64_t *shape, size_t *rank, EdgeError *error) {
    if (s->input_count != 1 || s->output_count < 1 || s->inputs[0].type != ORT_FLOAT || s->outputs[0].type != ORT_FLOAT)
        return fail(error, EDGE_WRONG_MODEL, "the model has %zu inputs; a net has one, of floats, and its first output is of floats",
                    s->input_count);
    if (*rank < s->inputs[0].rank) return fail(error, EDGE_BAD_ARGUMENT, "the input has %zu dimensions", s->inputs[0].rank);
    *rank = s->inputs[0].rank;
    memcpy(shape, s->inputs[0].shape, *rank * sizeof *shape);
    return 1;
}

int edge_run(EdgeSession *s, float *input, size_t count, const int64_t *shape, size_t rank, EdgeError *error) {
    int64_t stated[EDGE_MAX_RANK];
    size_t wanted = EDGE_MAX_RANK, volume = 1;
    if (!edge_input_shape(s, stated, &wanted, error)) return 0;
    if (rank != wanted) return fail(error, EDGE_BAD_ARGUMENT, "the shape has %zu sizes; this model's input has %zu", rank, wanted);
    for (size_t i = 0; i < rank; i++) {
        if (shape[i] < 1 || (stated[i] > 0 && shape[i] != stated[i]))
            return fail(error, EDGE_BAD_ARGUMENT, "size %zu of the shape is %lld; the model takes %lld (-1: any)", i, (long long)shape[i],
                        (long long)stated[i]);
        if (volume > count / (size_t)shape[i]) volume = count + 1; /* more than there are; no overflow */
        else volume *= (size_t)shape[i];
    }
    if (volume != count) return fail(error, EDGE_BAD_ARGUMENT, "%zu numbers do not fill the shape that is given", count);
    OrtValue *given = NULL, *got = NULL;
    const char *in_name = s->inputs[0].name, *out_name = s->outputs[0].name;
    int done = well(ORT(CreateTensorWithDataAsOrtValue)(s->memory, input, count * sizeof *input, shape, rank, ORT_FLOAT, &given), error) &&
               well(ORT(Run)(s->session, NULL, &in_name, (const OrtValue *const *)&given, 1, &out_name, 1, &got), error);
    if (given != NULL) ORT(ReleaseValue)(given);
    return done && keep_output(s, got, error);
}

const float *edge_output(const EdgeSession *s, int64_t *shape, size_t *rank) {
    *rank = s->rank;
    memcpy(shape, s->shape, s->rank * sizeof *shape);
    return s->data;
}
