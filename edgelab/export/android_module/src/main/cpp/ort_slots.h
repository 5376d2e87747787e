/* The part of ONNX Runtime's C interface that edgelab uses, so that no header of it is needed to build.
 *
 * OrtGetApiBase()->GetApi(1) is a table of functions. Its order is fixed: a release may add rows at the end and moves none (the
 * runtime's own build asserts that row 101 is ReleaseCustomOpDomain). X(row, name, result, parameters) below are the rows used here,
 * all of the first version of the interface, checked against include/onnxruntime/core/session/onnxruntime_c_api.h.
 * Paths are char * except on Windows, which this file does not serve.
 */
#ifndef EDGELAB_ORT_SLOTS_H
#define EDGELAB_ORT_SLOTS_H

#include <stddef.h>
#include <stdint.h>

typedef struct OrtStatus OrtStatus; /* NULL: it went well */
typedef struct OrtEnv OrtEnv;
typedef struct OrtSession OrtSession;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtRunOptions OrtRunOptions;
typedef struct OrtValue OrtValue;
typedef struct OrtTypeInfo OrtTypeInfo;
typedef struct OrtTensorInfo OrtTensorInfo;
typedef struct OrtMemoryInfo OrtMemoryInfo;
typedef struct OrtAllocator OrtAllocator;

typedef void (*OrtSlot)(void);
typedef struct OrtApiBase {
    const OrtSlot *(*GetApi)(uint32_t version);
    const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FLOAT = 1, ORT_INT64 = 7 };                     /* element types */
enum { ORT_LOG_ERROR = 3, ORT_OPTIMIZE_ALL = 99 };         /* what is logged; how far a graph is optimized */
enum { ORT_DEVICE_ALLOCATOR = 0, ORT_MEMORY_DEFAULT = 0 }; /* memory that the caller owns */

#define ORT_SLOTS(X)                                                                                                                \
    X(1, GetErrorCode, int, (const OrtStatus *))                                                                                    \
    X(2, GetErrorMessage, const char *, (const OrtStatus *))                                                                        \
    X(3, CreateEnv, OrtStatus *, (int log_level, const char *id, OrtEnv **))                                                        \
    X(7, CreateSession, OrtStatus *, (const OrtEnv *, const char *path, const OrtSessionOptions *, OrtSession **))                  \
    X(9, Run, OrtStatus *,                                                                                                          \
      (OrtSession *, const OrtRunOptions *, const char *const *input_names, const OrtValue *const *inputs, size_t input_count,      \
       const char *const *output_names, size_t output_count, OrtValue **outputs))                                                   \
    X(10, CreateSessionOptions, OrtStatus *, (OrtSessionOptions **))                                                                \
    X(23, SetSessionGraphOptimizationLevel, OrtStatus *, (OrtSessionOptions *, int level))                                          \
    X(24, SetIntraOpNumThreads, OrtStatus *, (OrtSessionOptions *, int threads))                                                    \
    X(25, SetInterOpNumThreads, OrtStatus *, (OrtSessionOptions *, int threads))                                                    \
    X(30, SessionGetInputCount, OrtStatus *, (const OrtSession *, size_t *))                                                        \
    X(31, SessionGetOutputCount, OrtStatus *, (const OrtSession *, size_t *))                                                       \
    X(33, SessionGetInputTypeInfo, OrtStatus *, (const OrtSession *, size_t index, OrtTypeInfo **))                                 \
    X(34, SessionGetOutputTypeInfo, OrtStatus *, (const OrtSession *, size_t index, OrtTypeInfo **))                                \
    X(36, SessionGetInputName, OrtStatus *, (const OrtSession *, size_t index, OrtAllocator *, char **))                            \
    X(37, SessionGetOutputName, OrtStatus *, (const OrtSession *, size_t index, OrtAllocator *, char **))                           \
    X(48, CreateTensorAsOrtValue, OrtStatus *, (OrtAllocator *, const int64_t *shape, size_t rank, int type, OrtValue **))          \
    X(49, CreateTensorWithDataAsOrtValue, OrtStatus *,                                                                              \
      (const OrtMemoryInfo *, void *data, size_t bytes, const int64_t *shape, size_t rank, int type, OrtValue **))                  \
    X(51, GetTensorMutableData, OrtStatus *, (OrtValue *, void **))                                                                 \
    X(55, CastTypeInfoToTensorInfo, OrtStatus *, (const OrtTypeInfo *, const OrtTensorInfo **))                                     \
    X(60, GetTensorElementType, OrtStatus *, (const OrtTensorInfo *, int *))                                                        \
    X(61, GetDimensionsCount, OrtStatus *, (const OrtTensorInfo *, size_t *))                                                       \
    X(62, GetDimensions, OrtStatus *, (const OrtTensorInfo *, int64_t *, size_t))                                                   \
    X(65, GetTensorTypeAndShape, OrtStatus *, (const OrtValue *, OrtTensorInfo **))                                                 \
    X(69, CreateCpuMemoryInfo, OrtStatus *, (int allocator, int memory, OrtMemoryInfo **))                                          \
    X(76, AllocatorFree, OrtStatus *, (OrtAllocator *, void *))                                                                     \
    X(78, GetAllocatorWithDefaultOptions, OrtStatus *, (OrtAllocator **))                                                           \
    X(92, ReleaseEnv, void, (OrtEnv *))                                                                                             \
    X(93, ReleaseStatus, void, (OrtStatus *))                                                                                       \
    X(94, ReleaseMemoryInfo, void, (OrtMemoryInfo *))                                                                               \
    X(95, ReleaseSession, void, (OrtSession *))                                                                                     \
    X(96, ReleaseValue, void, (OrtValue *))                                                                                         \
    X(98, ReleaseTypeInfo, void, (OrtTypeInfo *))                                                                                   \
    X(99, ReleaseTensorTypeAndShapeInfo, void, (OrtTensorInfo *))                                                                   \
    X(100, ReleaseSessionOptions, void, (OrtSessionOptions *))

#define ORT_ROW(row, name, result, parameters) ORT_ROW_##name = row,
enum { ORT_SLOTS(ORT_ROW) };
#undef ORT_ROW

#define ORT_TYPE(row, name, result, parameters) typedef result(*Ort_##name) parameters;
ORT_SLOTS(ORT_TYPE)
#undef ORT_TYPE

#endif
