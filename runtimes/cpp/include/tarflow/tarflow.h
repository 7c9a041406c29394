/* libtarflow: sample images from a TarFlow bundle, in C.
 *
 *   #include <stdio.h>
 *   #include <tarflow/tarflow.h>
 *
 *   int main(void) {
 *     static float images[2 * 28 * 28];  // two images of 28 x 28 pixels; tarflow_model_config() gives the sizes
 *     const int64_t labels[2] = {3, 7};
 *     tarflow_model *model = NULL;
 *     tarflow_sampler *sampler = NULL;
 *     tarflow_sample_options options;
 *     tarflow_sample_options_init(&options);
 *     options.guidance = 1.5;
 *     if (tarflow_model_open("mnist.tarflow", NULL, &model) || tarflow_sampler_create(model, &sampler) ||
 *         tarflow_sampler_sample(sampler, 2, labels, &options, images, 2 * 28 * 28))
 *       fprintf(stderr, "error: %s\nhint: %s\n", tarflow_last_message(), tarflow_last_hint());
 *     tarflow_sampler_free(sampler);
 *     tarflow_model_free(model);
 *     return sampler == NULL;
 *   }
 *
 * Rules that hold for every function:
 * - No function exits, throws, or writes to stdout or stderr. A function that can fail returns a `tarflow_status`. If
 *   it is not TARFLOW_OK, the outputs are undefined, the objects stay usable, and tarflow_last_message() and
 *   tarflow_last_hint() say, for the calling thread, what is wrong and how to fix it.
 * - A `tarflow_model` is constant once opened: any number of threads may use it. A `tarflow_sampler` may be used by one
 *   thread at a time, except for tarflow_sampler_cancel(). It keeps its model alive, so the two may be freed in any
 *   order. Do not free an object while a call on it is running.
 * - Pointers passed in are only read during the call. Arrays are dense, in C order, and must not overlap. Strings are
 *   UTF-8 and null-terminated.
 * - Initialise structs that have a `struct_size` with their _init function, which fills in sizes and defaults. New
 *   fields are only added at the end: for a caller built with an older header they keep their defaults; a caller built
 *   with a newer header than the library is refused with TARFLOW_ERROR_INPUT.
 * - Callbacks must not throw, and must not call into the object that calls them.
 *
 * Axes: n images, C channels, N patches, D values per patch. Images are float32 [n, C, height, width] in [-1, 1], not
 * clipped; those of a model of tokens are float32 [n, N, D], of any range. Latents are float32 [n, N, D]. Labels are
 * int64 [n]: 0 .. classes-1, or -1 for the null class; NULL means -1 for every image, which is the only choice for a
 * model without classes. Log-densities are in nats (natural logarithms).
 *
 * Functions that return no status cannot fail. All others may return TARFLOW_ERROR_MEMORY or TARFLOW_ERROR_INTERNAL.
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

#define TARFLOW_ABI_VERSION 2

typedef int32_t tarflow_status;
enum {
  TARFLOW_OK = 0,
  TARFLOW_ERROR_INPUT = 1,     /* an argument is out of range or contradicts another */
  TARFLOW_ERROR_BUNDLE = 2,    /* the bundle is missing, damaged, unsafe, or of an unsupported version */
  TARFLOW_ERROR_ENGINE = 3,    /* the engine cannot run here or on this bundle, or failed; ONNX Runtime is missing */
  TARFLOW_ERROR_CANCELLED = 4, /* the progress callback or tarflow_sampler_cancel() asked to stop */
  TARFLOW_ERROR_MEMORY = 5,    /* out of memory */
  TARFLOW_ERROR_INTERNAL = 6   /* a bug in this library, or a callback that threw */
};

/* An opened bundle. */
typedef struct tarflow_model tarflow_model;
/* Draws and scores images with a model. */
typedef struct tarflow_sampler tarflow_sampler;

/* ---- the library -------------------------------------------------------------------------------------------- */

/* TARFLOW_ABI_VERSION of the library, its release, and the name of a status. The strings are static. Any thread. */
TARFLOW_API uint32_t tarflow_abi_version(void);
TARFLOW_API const char *tarflow_version(void);
TARFLOW_API const char *tarflow_status_name(tarflow_status status);

/* The error message and hint of the last failed call in this thread, or "". Valid until the thread's next failure. */
TARFLOW_API const char *tarflow_last_message(void);
TARFLOW_API const char *tarflow_last_hint(void);

/* The version of ONNX Runtime in use, such as "1.32.0"; a static string, "" before anything needed it. Any thread. */
TARFLOW_API const char *tarflow_ort_version(void);

/* Write the seeded noise of images first_index .. first_index + n - 1 to noise [n, patches, patch_values]. Any thread.
 * TARFLOW_ERROR_INPUT: a number is out of range. */
TARFLOW_API tarflow_status tarflow_noise(uint64_t seed, uint64_t first_index, int64_t n, int64_t patches,
                                         int64_t patch_values, float *noise);

/* ---- models ------------------------------------------------------------------------------------------------- */

typedef int32_t tarflow_log_level;
enum { TARFLOW_LOG_INFO = 1, TARFLOW_LOG_WARNING = 2, TARFLOW_LOG_ERROR = 3 };

/* Called with each message of a model and its samplers: one line of text, valid during the call. Several threads may
 * call it at once, including the library's own: it must be thread-safe. */
typedef void (*tarflow_on_log)(tarflow_log_level level, const char *text, void *user_data);

typedef struct tarflow_model_options {
  size_t struct_size;
  const char *ort_library; /* path of ONNX Runtime's library; NULL searches, see docs/CPP.md */
  tarflow_on_log on_log;   /* or NULL: messages are dropped */
  void *log_user_data;     /* passed to on_log; must live as long as the model and its samplers */
  int32_t threads;         /* processors to use; 0 means all that are available to this process */
  int32_t skip_digests;    /* nonzero: do not compare the SHA-256 of the files (sizes and paths always are) */
  const char *engine;      /* "native" or "ort-cpu"; NULL, or "auto": native where it reads the bundle's precision */
} tarflow_model_options;

/* Fill the first `size` bytes of the struct with defaults. Call tarflow_model_options_init() instead. */
TARFLOW_API void tarflow_model_options_defaults(tarflow_model_options *options, size_t size);

/* Open and check the bundle directory at `path`; `options` may be NULL. The caller frees *model with
 * tarflow_model_free(); it is NULL on failure. Any thread.
 * TARFLOW_ERROR_BUNDLE: it is missing, damaged, unsafe, or of another version.
 * TARFLOW_ERROR_ENGINE: the engine is unknown or does not read the bundle's precision, or ort-cpu cannot load ONNX
 * Runtime; no other engine is used instead.
 *
 * Engine native needs ONNX Runtime only for the denoiser, also that of sample, and loads it when it is first called:
 * without it the call returns TARFLOW_ERROR_ENGINE. The process keeps the first ONNX Runtime that it loads: requesting
 * another file later fails with TARFLOW_ERROR_ENGINE. */
TARFLOW_API tarflow_status tarflow_model_open(const char *path, const tarflow_model_options *options,
                                              tarflow_model **model);

/* Free a model; NULL is allowed. Its samplers stay usable: what they share is freed with the last of them. */
TARFLOW_API void tarflow_model_free(tarflow_model *model);

typedef int32_t tarflow_data;
enum { TARFLOW_DATA_IMAGE = 0, TARFLOW_DATA_TOKENS = 1 };

typedef struct tarflow_config {
  size_t struct_size;
  tarflow_data data; /* what the model draws */
  int32_t nvp;       /* nonzero: a patch is z exp(a) + b, else z + b */
  int64_t image_size, image_channels, patch_size; /* 0 for tokens */
  int64_t patches;                                /* N */
  int64_t patch_values;                           /* D */
  int64_t width, blocks, layers, head_dim, classes;
  double noise_std; /* sigma of the training noise, 0 if unknown */
  char digest[65];  /* SHA-256 of the manifest, which identifies the bundle */
} tarflow_config;

/* Fill *config, initialised by tarflow_config_init(). Any thread. TARFLOW_ERROR_INPUT: its struct_size is invalid. */
TARFLOW_API tarflow_status tarflow_model_config(const tarflow_model *model, tarflow_config *config);

/* The name of class `number`; *name lives as long as the model. Any thread. TARFLOW_ERROR_INPUT: there is no name. */
TARFLOW_API tarflow_status tarflow_model_label(const tarflow_model *model, int64_t number, const char **name);

typedef struct tarflow_engine {
  size_t struct_size;
  const char *name;        /* "native" or "ort-cpu" */
  const char *ort_version; /* as tarflow_ort_version() */
  const char *precision;   /* of the bundle: "float32", "float16", "bfloat16" or "int8" */
  int64_t threads;
  const char *kernel;      /* of native, the instruction set that it computes with, such as "x86-64-v4"; else "" */
} tarflow_engine;

/* Describe the engine; the strings live as long as the model. Any thread. TARFLOW_ERROR_INPUT: invalid struct_size. */
TARFLOW_API tarflow_status tarflow_model_engine(const tarflow_model *model, tarflow_engine *engine);

/* ---- samplers ----------------------------------------------------------------------------------------------- */

/* Create a sampler; free it with tarflow_sampler_free(). Any thread; create one for each thread that samples. */
TARFLOW_API tarflow_status tarflow_sampler_create(const tarflow_model *model, tarflow_sampler **sampler);
TARFLOW_API void tarflow_sampler_free(tarflow_sampler *sampler); /* NULL is allowed */

/* Cancel the call that is running on the sampler: within one step of sampling, or one block of another call, it returns
 * TARFLOW_ERROR_CANCELLED, and the sampler stays usable. No effect if no call is running. Any thread, or a signal
 * handler; NULL is allowed. */
TARFLOW_API void tarflow_sampler_cancel(tarflow_sampler *sampler);

typedef struct tarflow_step {
  int64_t block; /* flow block that is being inverted; blocks-1 first, 0 last */
  int64_t step;  /* steps done, 1 .. total */
  int64_t total;
} tarflow_step;

/* Called in the sampling thread as steps finish, possibly several at a time. Returning nonzero cancels. */
typedef int (*tarflow_on_step)(const tarflow_step *step, void *user_data);

enum { TARFLOW_GUIDE_A = 1, TARFLOW_GUIDE_B = 2, TARFLOW_GUIDE_AB = 3 };

typedef struct tarflow_sample_options {
  size_t struct_size;
  uint64_t seed;        /* of the noise, docs/NOISE.md */
  uint64_t first_index; /* image i starts from the noise of (seed, first_index + i) */
  const float *noise;   /* [n, N, D], replaces the seeded noise (then seed and first_index must be 0); or NULL */
  double guidance;      /* guidance weight >= 0; 0 means no guidance */
  double attention_temperature; /* > 0, of the unguided branch */
  int32_t guide;                /* TARFLOW_GUIDE_* */
  int32_t anneal_guidance;      /* nonzero: the weight grows from patch to patch */
  int32_t denoise;              /* nonzero (the default): remove the training noise; 0 to decode given latents */
  int64_t batch_size;           /* images that run together; 0 means 64 */
  tarflow_on_step on_step;      /* or NULL */
  void *user_data;              /* passed to on_step */
} tarflow_sample_options;

/* Fill the first `size` bytes of the struct with defaults. Call tarflow_sample_options_init() instead. */
TARFLOW_API void tarflow_sample_options_defaults(tarflow_sample_options *options, size_t size);

/* Draw n images into `images`, [n, C, height, width] or [n, N, D], `images_length` floats; `options` may be NULL. The
 * noise of image i depends only on the seed and first_index + i, not on the batch.
 * TARFLOW_ERROR_INPUT: arguments are out of range or contradictory. TARFLOW_ERROR_ENGINE: the engine failed, or denoise
 * needs an ONNX Runtime that is missing, which is reported before the first step.
 * TARFLOW_ERROR_CANCELLED: by on_step or tarflow_sampler_cancel(); the sampler stays usable. Images with values that
 * are not finite are not an error: the log has a warning, and the report lists them. */
TARFLOW_API tarflow_status tarflow_sampler_sample(tarflow_sampler *sampler, int64_t n, const int64_t *labels,
                                                  const tarflow_sample_options *options, float *images,
                                                  size_t images_length);

/* How the last tarflow_sampler_sample() went; pointers are valid until the sampler's next call. */
typedef struct tarflow_report {
  size_t struct_size;
  int64_t images;            /* number of images drawn; 0 before the first call and after a failed one */
  int64_t non_finite_count;  /* number of images with values that are not finite: the model overflowed */
  const int64_t *non_finite; /* the indices of these images, [non_finite_count] */
} tarflow_report;

/* Fill *report, initialised by tarflow_report_init(). TARFLOW_ERROR_INPUT: its struct_size is invalid. */
TARFLOW_API tarflow_status tarflow_sampler_report(const tarflow_sampler *sampler, tarflow_report *report);

/* images -> latents z [n, N, D] and log|det dz/dx| [n], nats; either output may be NULL. Statuses as for sample. */
TARFLOW_API tarflow_status tarflow_sampler_encode(tarflow_sampler *sampler, int64_t n, const float *images,
                                                  const int64_t *labels, float *z, double *log_det);

/* images -> log q(image | label) [n], nats. No dequantisation noise is added. Statuses as for sample. */
TARFLOW_API tarflow_status tarflow_sampler_log_prob(tarflow_sampler *sampler, int64_t n, const float *images,
                                                    const int64_t *labels, double *log_prob);

/* images -> images + strength * sigma^2 * grad log q(image | label). sigma 0 means the model's training noise.
 * Statuses as for sample; TARFLOW_ERROR_INPUT also if sigma is neither known nor given. */
TARFLOW_API tarflow_status tarflow_sampler_denoise(tarflow_sampler *sampler, int64_t n, const float *images,
                                                   const int64_t *labels, double sigma, double strength,
                                                   float *denoised);

/* images -> log p(class | image) [n, classes] by Bayes' rule under a uniform prior. Statuses as for sample;
 * TARFLOW_ERROR_INPUT also for a model without classes. */
TARFLOW_API tarflow_status tarflow_sampler_classify(tarflow_sampler *sampler, int64_t n, const float *images,
                                                    double *log_posteriors);

/* ---- initialising structs ----------------------------------------------------------------------------------- */

TARFLOW_INLINE void tarflow_model_options_init(tarflow_model_options *options) {
  tarflow_model_options_defaults(options, sizeof *options);
}

TARFLOW_INLINE void tarflow_sample_options_init(tarflow_sample_options *options) {
  tarflow_sample_options_defaults(options, sizeof *options);
}

TARFLOW_INLINE void tarflow_config_init(tarflow_config *config) { config->struct_size = sizeof *config; }

TARFLOW_INLINE void tarflow_engine_init(tarflow_engine *engine) { engine->struct_size = sizeof *engine; }

TARFLOW_INLINE void tarflow_report_init(tarflow_report *report) { report->struct_size = sizeof *report; }

#ifdef __cplusplus
}
#endif
#endif
