/* libtarflow: pictures from a TarFlow bundle, in C.
 *
 * Rules that hold for every function:
 * - Nothing here exits, throws or writes to stdout or stderr. A function that can fail returns a `tarflow_status`; on
 *   anything but TARFLOW_OK its outputs hold nothing of use, the objects stay usable, and tarflow_last_message() and
 *   tarflow_last_hint() say, for the calling thread, what is wrong and how to mend it.
 * - A `tarflow_model` is constant once opened: any number of threads may use it. A `tarflow_sampler` belongs to one
 *   thread at a time; it keeps its model alive, so that the two may be freed in any order.
 * - Pointers passed in are read during the call only. Arrays are dense, C order, and must not overlap.
 * - Structs start with `struct_size`: set them up with their _INIT function, which fills in sizes and defaults.
 *
 * Axes: n images, C channels, N patches, D values per patch. Images are float32 [n, C, height, width] in [-1, 1];
 * latents are float32 [n, N, D]. Labels are 0 .. classes-1, or -1 for the null class; NULL is -1 for every image, and
 * the only choice for a model without classes.
 */
#ifndef TARFLOW_TARFLOW_H
#define TARFLOW_TARFLOW_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) && !defined(_WIN32)
#define TARFLOW_API __attribute__((visibility("default")))
#else
#define TARFLOW_API
#endif

#if defined(__cplusplus) || (defined(__STDC_VERSION__) && __STDC_VERSION__ >= 199901L)
#define TARFLOW_INLINE static inline
#elif defined(__GNUC__)
#define TARFLOW_INLINE static __inline__
#else
#define TARFLOW_INLINE static
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TARFLOW_ABI_VERSION 1

typedef int32_t tarflow_status;
enum {
  TARFLOW_OK = 0,
  TARFLOW_ERROR_INPUT = 1,     /* an argument is out of range or contradicts another */
  TARFLOW_ERROR_BUNDLE = 2,    /* the bundle is missing, damaged, unsafe or too new */
  TARFLOW_ERROR_ENGINE = 3,    /* ONNX Runtime is missing, too old, or failed */
  TARFLOW_ERROR_CANCELLED = 4, /* the progress callback asked to stop */
  TARFLOW_ERROR_MEMORY = 5,    /* no memory */
  TARFLOW_ERROR_INTERNAL = 6   /* a fault of this library */
};

typedef struct tarflow_model tarflow_model;
typedef struct tarflow_sampler tarflow_sampler;

/* TARFLOW_ABI_VERSION of the library, its release, and the name of a status. Static strings. */
TARFLOW_API uint32_t tarflow_abi_version(void);
TARFLOW_API const char *tarflow_version(void);
TARFLOW_API const char *tarflow_status_name(tarflow_status status);

/* What the last failed call of this thread said; "" when there is none. Valid until the thread's next failure. */
TARFLOW_API const char *tarflow_last_message(void);
TARFLOW_API const char *tarflow_last_hint(void);

typedef struct tarflow_model_options {
  size_t struct_size;
  const char *ort_library; /* path of ONNX Runtime's library; NULL searches, see docs/CPP.md */
  int32_t threads;         /* inside the operators; 0 is one per processor that may be used */
  int32_t skip_digests;    /* nonzero: do not compare the SHA-256 of the files (sizes and paths are always checked) */
} tarflow_model_options;

/* Fill the first `size` bytes of the struct with defaults. Call the inline function below instead. */
TARFLOW_API void tarflow_model_options_defaults(tarflow_model_options *options, size_t size);

/* Open and check the bundle directory at `path`. `options` may be NULL. Free *model with tarflow_model_free.
 * The process keeps the first ONNX Runtime it loads: asking for another file later is TARFLOW_ERROR_ENGINE. */
TARFLOW_API tarflow_status tarflow_model_open(const char *path, const tarflow_model_options *options,
                                              tarflow_model **model);
TARFLOW_API void tarflow_model_free(tarflow_model *model); /* NULL is fine */

typedef struct tarflow_config {
  size_t struct_size;
  int64_t image_size, image_channels, patch_size, width, blocks, layers, head_dim, classes;
  int64_t patches;      /* N */
  int64_t patch_values; /* D */
  double noise_std;     /* of the training noise, 0 when unknown */
  char digest[65];      /* SHA-256 of the manifest, which identifies the bundle */
} tarflow_config;

/* Fill *config, whose struct_size must be set. */
TARFLOW_API tarflow_status tarflow_model_config(const tarflow_model *model, tarflow_config *config);

/* The name of a class; *name lives as long as the model. TARFLOW_ERROR_INPUT when it has none. */
TARFLOW_API tarflow_status tarflow_model_label(const tarflow_model *model, int64_t number, const char **name);

/* The version of ONNX Runtime in use, such as "1.32.0"; a static string, "" before the first model. */
TARFLOW_API const char *tarflow_ort_version(void);

TARFLOW_API tarflow_status tarflow_sampler_create(const tarflow_model *model, tarflow_sampler **sampler);
TARFLOW_API void tarflow_sampler_free(tarflow_sampler *sampler); /* NULL is fine */

typedef struct tarflow_step {
  int64_t block; /* flow block that is being inverted; blocks-1 first, 0 last */
  int64_t step;  /* steps done, 1 .. total */
  int64_t total;
} tarflow_step;

/* Called in the sampling thread after every step. Return 0 to go on, anything else to cancel. Must not throw. */
typedef int (*tarflow_on_step)(const tarflow_step *step, void *user_data);

enum { TARFLOW_GUIDE_A = 1, TARFLOW_GUIDE_B = 2, TARFLOW_GUIDE_AB = 3 };

typedef struct tarflow_sample_options {
  size_t struct_size;
  uint64_t seed;        /* of the noise, docs/NOISE.md */
  uint64_t first_index; /* image i starts from the noise of (seed, first_index + i) */
  const float *noise;   /* [n, N, D] in place of the seeded noise; NULL for none. seed and first_index must be 0 then */
  double guidance;      /* weight >= 0; 0 is no guidance */
  double attention_temperature; /* > 0, of the branch that guidance moves away from */
  int32_t guide;                /* TARFLOW_GUIDE_* */
  int32_t anneal_guidance;      /* nonzero: the weight grows from patch to patch */
  int32_t denoise;              /* nonzero (the default): remove the training noise */
  int32_t reserved;             /* 0 */
  int64_t batch_size;           /* images that run together; 0 is 64 */
  tarflow_on_step on_step;      /* or NULL */
  void *user_data;              /* handed to on_step */
} tarflow_sample_options;

TARFLOW_API void tarflow_sample_options_defaults(tarflow_sample_options *options, size_t size);

/* Draw n images into `images` [n, C, height, width], `images_length` floats. `options` may be NULL.
 * After TARFLOW_ERROR_CANCELLED the sampler is as usable as before. */
TARFLOW_API tarflow_status tarflow_sampler_sample(tarflow_sampler *sampler, int64_t n, const int64_t *labels,
                                                  const tarflow_sample_options *options, float *images,
                                                  size_t images_length);

/* images -> latents z [n, N, D] and log|det dz/dx| [n], nats; either output may be NULL. */
TARFLOW_API tarflow_status tarflow_sampler_encode(tarflow_sampler *sampler, int64_t n, const float *images,
                                                  const int64_t *labels, float *z, double *log_det);

/* images -> log q(image | label) [n], nats. No dequantisation noise is added. */
TARFLOW_API tarflow_status tarflow_sampler_log_prob(tarflow_sampler *sampler, int64_t n, const float *images,
                                                    const int64_t *labels, double *log_prob);

/* images -> images + strength * sigma^2 * grad log q(image | label). sigma 0 is the model's training noise. */
TARFLOW_API tarflow_status tarflow_sampler_denoise(tarflow_sampler *sampler, int64_t n, const float *images,
                                                   const int64_t *labels, double sigma, double strength,
                                                   float *denoised);

/* The seeded noise of images first_index .. first_index + n - 1: [n, patches, patch_values]. */
TARFLOW_API tarflow_status tarflow_noise(uint64_t seed, uint64_t first_index, int64_t n, int64_t patches,
                                         int64_t patch_values, float *noise);

TARFLOW_INLINE void tarflow_model_options_init(tarflow_model_options *options) {
  tarflow_model_options_defaults(options, sizeof *options);
}

TARFLOW_INLINE void tarflow_sample_options_init(tarflow_sample_options *options) {
  tarflow_sample_options_defaults(options, sizeof *options);
}

#ifdef __cplusplus
}
#endif
#endif
