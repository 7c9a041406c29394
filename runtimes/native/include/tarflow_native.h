/* tarflow_native.h: one TarFlow block on the CPU, from noise to patches one after the other, and back at once.
 *
 *     inverse:  x_0 = z_0;   x_{i+1} = z_{i+1} exp(a_i) + b_i,      (a_i, b_i) from x_0 .. x_i,   i = 0 .. N-2
 *     forward:  z_0 = x_0;   z_{i+1} = (x_{i+1} - b_i) exp(-a_i),   log|det| = -sum of a
 *
 * Pack the weights of a block once, then run it for any batch:
 *
 *     size_t bytes = tarflow_native_packed_bytes(&shape, "float32");
 *     tarflow_native_pack(&shape, "float32", tensors, count, weights, weights_bytes, packed, bytes, NULL);
 *     run.packed = packed; ...                     pass.packed = packed; ...
 *     tarflow_native_invert(&run);                 tarflow_native_forward(&pass);
 *
 * Axis letters: B images, N patches, D values of a patch, W width, E head dimension, L layers, G branches (1 or 2).
 *
 * One set of bits: finite results depend on the weights, the input and the conditions of an image alone, not on the
 * batch, the place in it, the number of threads or the kernel (WebAssembly, which has no fused multiply-add, excepted).
 *
 * Memory is the caller's: nothing is allocated but the stacks of threads, and no state outlives a call. Any function
 * may be called from any number of threads at once; calls that run at once need workspaces of their own and may share
 * the packed weights. Buffers `packed` and `workspace` begin at a multiple of TARFLOW_NATIVE_ALIGNMENT bytes.
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

/* Changes whenever a structure, a function or the layout of packed weights does. */
#define TARFLOW_NATIVE_ABI 2
#define TARFLOW_NATIVE_ALIGNMENT 64

typedef enum tarflow_native_status {
  TARFLOW_NATIVE_OK = 0,
  TARFLOW_NATIVE_CANCELLED = 1,      /* x holds the patches finished so far, noise in the others; z is unfinished */
  TARFLOW_NATIVE_BAD_SHAPE = 2,      /* a size is not positive, too large, or W is not a multiple of E */
  TARFLOW_NATIVE_BAD_PRECISION = 3,  /* not float32, bfloat16 or int8 */
  TARFLOW_NATIVE_BAD_TENSOR = 4,     /* one is missing, has another dtype or shape, or leaves the file */
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
  int64_t classes;  /* 0 for models without */
  int64_t nvp;      /* 0: shifts alone, a = 0 */
} tarflow_native_shape;

/* An entry of a bundle's table of tensors (docs/BUNDLE.md). */
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
  int64_t steps;                    /* 0 .. N-1: how many patches after the first are finished */
  int64_t threads;                  /* at most; they share out the images */
  const char *kernel;               /* a name from tarflow_native_kernel, or NULL for the best */
  const float *noise;               /* z [B, N, D] */
  float *x;                         /* [B, N, D], may be `noise` */
  const int64_t *labels;            /* [G, B], 0 .. classes; NULL for models without classes */
  const float *guidance;            /* [B, 2, N], of a and of b; read where G is 2, else may be NULL */
  const float *inverse_temperature; /* [G, B], or NULL for 1 */
  void *workspace;
  size_t workspace_bytes;
  const int32_t *cancel; /* NULL, or: another thread stores a 1 (atomically), and the call ends within a step */
  int64_t *progress;     /* NULL, or: grows (atomically) by one for each image and step, up to B * steps */
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

/* Names of the kernels that run on this machine, the best first: x86-64-v4, x86-64-v3, aarch64, portable; NULL past the
 * last. Number 0 is what runs. */
TARFLOW_NATIVE_API const char *tarflow_native_kernel(int64_t number);

/* What a status means, in English; static. */
TARFLOW_NATIVE_API const char *tarflow_native_message(int32_t status);

/* Bytes of a packed block; 0 where shape or precision cannot be packed. */
TARFLOW_NATIVE_API size_t tarflow_native_packed_bytes(const tarflow_native_shape *shape, const char *precision);

/* Lays the weights of a block out for the kernels; the same bytes for all of them. `weights` is the block's weights.bin
 * in memory. On BAD_TENSOR, `*culprit` (unless NULL) is the name of the tensor; static. */
TARFLOW_NATIVE_API int32_t tarflow_native_pack(const tarflow_native_shape *shape, const char *precision,
                                               const tarflow_native_tensor *tensors, int64_t count, const void *weights,
                                               size_t weights_bytes, void *packed, size_t packed_bytes,
                                               const char **culprit);

/* Bytes of workspace that inverting needs, bounded in B; 0 where an argument is out of range. */
TARFLOW_NATIVE_API size_t tarflow_native_workspace_bytes(const tarflow_native_shape *shape, int64_t batch,
                                                         int64_t branches, int64_t threads);

/* Inverts a block. Whatever it returns, only x and the workspace have been written. */
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
