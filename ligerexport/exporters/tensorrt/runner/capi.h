/* The runner as a C interface, for whoever embeds it: an artifact's engine, and sequences that advance on it.
 *
 * Functions that can fail return NULL or a number other than 0; `liger_error` then says why, for the thread that
 * called. An engine may be used by several threads, a session by one at a time. Sessions keep their engine alive. */
#ifndef LIGER_CAPI_H
#define LIGER_CAPI_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define LIGER_INTERFACE 1
#define LIGER_BUILD 1   /* flag: build the engine even where there is one */
#define LIGER_VERBOSE 2 /* flag: what TensorRT has to say goes to stderr, all of it */
#define LIGER_ALL_ROWS (-1)

typedef struct liger_engine liger_engine;
typedef struct liger_session liger_session;

/* LIGER_INTERFACE of the library, which grows when something here changes. */
int liger_interface(void);

/* What went wrong last; a second line "hint: .." may say what to do. */
const char* liger_error(void);

/* Opens an artifact: finds its engine for this TensorRT and GPU, or builds it where there is none.
 * plugin: libligerexport_trt.so; NULL for one beside this library or in its folder plugin, never the artifact's.
 * precision: of activations before TensorRT 10; NULL for what the artifact says.
 * batch: the most sequences of a session. */
liger_engine* liger_engine_open(const char* artifact, const char* plugin, const char* precision, int batch, int flags);
void liger_engine_close(liger_engine* engine);

/* JSON, valid while the engine is open: "engine", "tensorrt", "sm", "plugin", "model", "precision", "batch", "chunk",
 * "build_seconds". */
const char* liger_engine_describe(const liger_engine* engine);

/* Begins `batch` sequences. graph: whether steps and whole chunks are replayed as CUDA graphs. chunk: tokens of one call
 * of the engine, at most its "chunk", of which many sequences have a part each; 0 for that. */
liger_session* liger_session_open(liger_engine* engine, int batch, int graph, int chunk);
void liger_session_close(liger_session* session);

/* JSON, valid while the session is open: "batch", "chunk", "vocab", "state_bytes", and "state", for each tensor "past",
 * "present", "dtype", "shape", "bytes". Tensors are numbered in this order. */
const char* liger_session_describe(const liger_session* session);

/* Tokens that each row has seen [batch]; negative where its next tokens are padding. May be written between calls. */
int32_t* liger_session_position(liger_session* session);

/* Advances every row by `tokens` tokens, ids [batch, tokens]. logits [batch, vocab] are of the last token; or NULL, then
 * it returns before the device is done, and `liger_session_wait` waits. */
int liger_session_advance(liger_session* session, const int32_t* ids, int tokens, float* logits);
int liger_session_wait(liger_session* session);

/* Forgets a row, or LIGER_ALL_ROWS. */
int liger_session_reset(liger_session* session, int row);

/* Copies one row of a state tensor, or LIGER_ALL_ROWS, to or from the host; `bytes` must be what that takes. */
int liger_session_read(liger_session* session, int tensor, int row, void* to, size_t bytes);
int liger_session_write(liger_session* session, int tensor, int row, const void* from, size_t bytes);

/* Advances by a token and measures what the device takes for it; graph: by the CUDA graph, where there is one. */
int liger_session_time_step(liger_session* session, int graph, double* milliseconds);

/* JSON, valid until the next call: for each layer of the step the median of so many runs in milliseconds. Layers wait
 * for each other, and state is changed. */
const char* liger_session_profile(liger_session* session, int steps);

/* Bytes of the device that are taken, by whoever. */
int liger_device_bytes(size_t* bytes);

#ifdef __cplusplus
}
#endif
#endif
