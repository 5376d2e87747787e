/* A model file in ONNX Runtime, for a language model with a key/value cache or for any net of floats. Plain C: the Java and the Swift
 * classes sit on this. One thread at a time may use a session; the callers lock. */
#ifndef EDGELAB_EDGE_RUNTIME_H
#define EDGELAB_EDGE_RUNTIME_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum { /* beside ONNX Runtime's own codes, which are positive */
    EDGE_NO_RUNTIME = -1,   /* its library is not there, or is a version that this file does not know */
    EDGE_WRONG_MODEL = -2,  /* a file that is no model of the kind asked for */
    EDGE_NO_MEMORY = -3,
    EDGE_BAD_ARGUMENT = -4
};
enum { EDGE_MAX_RANK = 8 };

typedef struct EdgeError {
    int code; /* 0: none */
    char message[1024];
} EdgeError;

typedef struct EdgeSession EdgeSession;

/* Finds ONNX Runtime: `library` is a path or a name for dlopen, NULL where the program is linked with it. Once a process is enough; a
 * later call changes nothing. Returns the runtime's version, or NULL and `error`. */
const char *edge_start(const char *library, EdgeError *error);

/* The model at `path` with `threads` threads (0: as many as the runtime likes), or NULL and `error`. */
EdgeSession *edge_open(const char *path, int threads, EdgeError *error);
void edge_close(EdgeSession *session); /* NULL is fine */

/* -- a language model: inputs input_ids, attention_mask, past_key_values.*; outputs logits, present.* */

/* 1 if it is one; 0, and in `error` what is missing, if it is not. */
int edge_is_language_model(const EdgeSession *session, EdgeError *error);
int64_t edge_vocabulary(const EdgeSession *session);
int64_t edge_past(const EdgeSession *session); /* tokens read so far */
void edge_forget(EdgeSession *session);

/* Reads `ids` [rows, n] after what was read before. `mask` [rows, past + n]: 1, or 0 for padding at the left; NULL is all ones. The keys
 * and values stay where the runtime left them. 1, or 0 and `error`: then what was read before is as it was. */
int edge_feed(EdgeSession *session, int64_t *ids, int64_t *mask, size_t rows, size_t n, EdgeError *error);

/* -- a net with one float input */

/* 1 and the shape that the file states, -1 where any size will do; `rank` in: room, out: used. 0 and `error` where it is no such net. */
int edge_input_shape(const EdgeSession *session, int64_t *shape, size_t *rank, EdgeError *error);
int edge_run(EdgeSession *session, float *input, size_t count, const int64_t *shape, size_t rank, EdgeError *error);

/* -- what the last edge_feed (logits [rows, n, vocabulary]) or edge_run (the first output) gave; valid until the next call */

const float *edge_output(const EdgeSession *session, int64_t *shape, size_t *rank);

#ifdef __cplusplus
}
#endif
#endif
