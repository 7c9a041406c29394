/* tarflow_native.h: one TarFlow block on the CPU, inverse and forward pass. Pack the weights of a block once, then
 * invert it for any batch of noise z:
 *
 *   #include <stdlib.h>
 *   #include <tarflow_native.h>
 *
 *   int32_t invert(const tarflow_native_shape *shape, const tarflow_native_tensor *tensors, int64_t count,
 *                  const void *weights, size_t weights_bytes, int64_t batch, const float *z, float *x) {
 *     size_t packed_bytes = tarflow_native_packed_bytes(shape, "float32");
 *     size_t workspace_bytes = tarflow_native_workspace_bytes(shape, batch, 1, 2);
 *     void *packed = aligned_alloc(TARFLOW_NATIVE_ALIGNMENT, packed_bytes);
 *     void *workspace = aligned_alloc(TARFLOW_NATIVE_ALIGNMENT, workspace_bytes);
 *     tarflow_native_run run = {.struct_size = sizeof run, .packed = packed, .packed_bytes = packed_bytes,
 *                               .batch = batch, .branches = 1, .steps = shape->patches - 1, .threads = 2, .noise = z,
 *                               .x = x, .workspace = workspace, .workspace_bytes = workspace_bytes};
 *     int32_t status = tarflow_native_pack(shape, "float32", tensors, count, weights, weights_bytes, packed,
 *                                          packed_bytes, NULL);
 *     if (status == TARFLOW_NATIVE_OK) status = tarflow_native_invert(&run);
 *     free(workspace);
 *     free(packed);
 *     return status;  // tarflow_native_message(status) says what it means
 *   }
 *
 * tarflow_native_forward takes images the other way. With (a_i, b_i) from x_0 .. x_i and i = 0 .. N-2:
 *
 *     inverse:  x_0 = z_0;   x_{i+1} = z_{i+1} exp(a_i) + b_i
 *     forward:  z_0 = x_0;   z_{i+1} = (x_{i+1} - b_i) exp(-a_i),   log|det| = -sum of a
 *
 * Axis letters: B images, N patches, D values per patch, W width, E head dimension, L layers, G branches (1 or 2).
 *
 * Results are bit-identical: finite values depend only on the weights and on the input and conditions of an image, not
 * on the batch, the position in the batch, the number of threads or the kernel. The exception is WebAssembly, which has
 * no fused multiply-add.
 *
 * The caller provides all memory: the library allocates only the stacks of threads. The only state between calls is a
 * note of when threads last had to wait for each other; they then stop sharing columns for a while. Any function may be
 * called from any number of threads at once; concurrent calls need separate workspaces and may share packed weights.
 * `packed` and `workspace` must be aligned to TARFLOW_NATIVE_ALIGNMENT bytes.
 */
#ifndef TARFLOW_NATIVE_H
#define TARFLOW_NATIVE_H

#include <stddef.h>
#include <stdint.h>

#if defined(TARFLOW_NATIVE_STATIC)
#define TARFLOW_NATIVE_API
#elif defined(_WIN32)
#define TARFLOW_NATIVE_API __declspec(dllexport)
#else
#define TARFLOW_NATIVE_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes whenever a struct, a function or the layout of packed weights changes. */
#define TARFLOW_NATIVE_ABI 3
#define TARFLOW_NATIVE_ALIGNMENT 64

typedef enum tarflow_native_status {
  TARFLOW_NATIVE_OK = 0,
  TARFLOW_NATIVE_CANCELLED = 1,      /* x: the patches finished so far, noise for the others; z is unfinished */
  TARFLOW_NATIVE_BAD_SHAPE = 2,      /* a size is not positive, too large, or W is not a multiple of E */
  TARFLOW_NATIVE_BAD_PRECISION = 3,  /* not float32, bfloat16 or int8 */
  TARFLOW_NATIVE_BAD_TENSOR = 4,     /* a tensor is missing, has the wrong dtype or shape, or exceeds the file */
  TARFLOW_NATIVE_BAD_ORDER = 5,      /* `order` is neither 0 .. N-1 nor N-1 .. 0 */
  TARFLOW_NATIVE_SMALL_BUFFER = 6,   /* packed or workspace is smaller than needed, or not aligned */
  TARFLOW_NATIVE_NOT_PACKED = 7,     /* `packed` was not written by tarflow_native_pack of this version */
  TARFLOW_NATIVE_BAD_ARGUMENT = 8,   /* a pointer is null, a count or a label is out of range */
  TARFLOW_NATIVE_BAD_KERNEL = 9      /* no kernel of that name runs on this machine */
} tarflow_native_status;

/* The sizes of a block. */
typedef struct tarflow_native_shape {
  int64_t patches;  /* N, at least 2 */
  int64_t values;   /* D */
  int64_t width;    /* W */
  int64_t layers;   /* L */
  int64_t head_dim; /* E */
  int64_t classes;  /* 0 for models without classes */
  int64_t nvp;      /* 0: shifts only, a = 0 */
} tarflow_native_shape;

/* An entry of the table of tensors of a bundle (docs/BUNDLE.md). */
typedef struct tarflow_native_tensor {
  const char *name;
  const char *dtype; /* as in the manifest */
  const int64_t *shape;
  int64_t rank;
  int64_t offset; /* bytes from the start of weights.bin */
} tarflow_native_tensor;

/* One call of tarflow_native_invert. Patches are in block order. */
typedef struct tarflow_native_run {
  size_t struct_size; /* sizeof(tarflow_native_run) */
  const void *packed;
  size_t packed_bytes;
  int64_t batch;                    /* B, at least 1 */
  int64_t branches;                 /* G; the second branch is the unguided one */
  int64_t steps;                    /* 0 .. N-1: how many patches to compute after the first */
  int64_t threads;                  /* the most threads to use; they divide the images, or the columns of a few */
  const char *kernel;               /* a name from tarflow_native_kernel, or NULL for the best */
  const float *noise;               /* z [B, N, D] */
  float *x;                         /* [B, N, D], may be `noise` */
  const int64_t *labels;            /* [G, B], 0 .. classes; NULL for models without classes */
  const float *guidance;            /* [B, 2, N], weights for a and b; may be NULL if G is 1 */
  const float *inverse_temperature; /* [G, B], or NULL for all ones */
  void *workspace;
  size_t workspace_bytes;
  const int32_t *cancel; /* or NULL: when another thread stores 1 (atomically), the call returns within a step */
  int64_t *progress;     /* or NULL: incremented (atomically) for each image and step, up to B * steps */
} tarflow_native_run;

/* One call of tarflow_native_forward. Patches are in block order. */
typedef struct tarflow_native_pass {
  size_t struct_size; /* sizeof(tarflow_native_pass) */
  const void *packed;
  size_t packed_bytes;
  int64_t batch;         /* B, at least 1 */
  int64_t threads;       /* at most; they share out the images, and the patches where there are fewer images */
  const char *kernel;    /* a name from tarflow_native_kernel, or NULL for the best */
  const float *x;        /* [B, N, D] */
  float *z;              /* [B, N, D], not `x` */
  double *log_det;       /* log|det dz/dx| [B], nats */
  const int64_t *labels; /* [B], 0 .. classes; NULL for models without classes */
  void *workspace;
  size_t workspace_bytes;
  const int32_t *cancel; /* NULL, or: another thread stores a 1 (atomically), and the call ends within a layer */
  int64_t *progress;     /* NULL, or: grows (atomically) by one for each image and patch, up to B * (N - 1) */
} tarflow_native_pass;

/* TARFLOW_NATIVE_ABI of the library. */
TARFLOW_NATIVE_API int32_t tarflow_native_abi(void);

/* Names of the kernels that run on this machine, fastest first: x86-64-v4-vnni, x86-64-v4, x86-64-v3, aarch64,
 * portable; NULL after the last. Number 0 is the default. */
TARFLOW_NATIVE_API const char *tarflow_native_kernel(int64_t number);

/* The meaning of a status, in English; a static string. */
TARFLOW_NATIVE_API const char *tarflow_native_message(int32_t status);

/* Size of a packed block in bytes; 0 if the shape or precision is invalid. */
TARFLOW_NATIVE_API size_t tarflow_native_packed_bytes(const tarflow_native_shape *shape, const char *precision);

/* Arranges the weights of a block for the kernels; the layout is the same for all of them. `weights` is the block's
 * weights.bin in memory. On BAD_TENSOR, `*culprit` (unless NULL) is the name of the tensor, a static string. */
TARFLOW_NATIVE_API int32_t tarflow_native_pack(const tarflow_native_shape *shape, const char *precision,
                                               const tarflow_native_tensor *tensors, int64_t count, const void *weights,
                                               size_t weights_bytes, void *packed, size_t packed_bytes,
                                               const char **culprit);

/* Size of the workspace in bytes, which is bounded as B grows; 0 if an argument is out of range. */
TARFLOW_NATIVE_API size_t tarflow_native_workspace_bytes(const tarflow_native_shape *shape, int64_t batch,
                                                         int64_t branches, int64_t threads);

/* Inverts a block. It writes only to x and the workspace, whatever status it returns. */
TARFLOW_NATIVE_API int32_t tarflow_native_invert(const tarflow_native_run *run);

/* Bytes of workspace that the forward pass needs, bounded in B; 0 where an argument is out of range. */
TARFLOW_NATIVE_API size_t tarflow_native_forward_bytes(const tarflow_native_shape *shape, int64_t batch,
                                                       int64_t threads);

/* Takes patches forward through a block. Whatever it returns, only z, log_det and the workspace have been written. */
TARFLOW_NATIVE_API int32_t tarflow_native_forward(const tarflow_native_pass *pass);

#ifdef __cplusplus
}
#endif
#endif
