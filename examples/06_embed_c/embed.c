/* libtarflow inside a C application: embed_c BUNDLE */
#include <stdio.h>
#include <stdlib.h>
#include <tarflow/tarflow.h>

static int failed(tarflow_status status) {
  if (status == TARFLOW_OK) return 0;
  fprintf(stderr, "error: %s\nhint: %s\n", tarflow_last_message(), tarflow_last_hint());
  return 1;
}

int main(int argc, char **argv) {
  tarflow_model *model = NULL;
  tarflow_sampler *sampler = NULL;
  tarflow_config config;
  tarflow_engine engine;
  tarflow_sample_options options;
  float *images = NULL;
  size_t length;
  int bad;

  if (argc != 2) {
    fprintf(stderr, "usage: embed_c BUNDLE\n");
    return 2;
  }
  tarflow_config_init(&config);
  tarflow_engine_init(&engine);
  tarflow_sample_options_init(&options);
  options.seed = 7;
  options.denoise = 0; /* as drawn: what takes the training noise out needs ONNX Runtime */
  bad = failed(tarflow_model_open(argv[1], NULL, &model)) || failed(tarflow_model_config(model, &config)) ||
        failed(tarflow_model_engine(model, &engine)) || failed(tarflow_sampler_create(model, &sampler));
  if (!bad) {
    length = 2 * (size_t)(config.patches * config.patch_values);
    images = (float *)malloc(length * sizeof *images);
    bad = images == NULL || failed(tarflow_sampler_sample(sampler, 2, NULL, &options, images, length));
    if (!bad) printf("2 images of %ld values by %s, the first is %f\n", (long)(length / 2), engine.name, images[0]);
  }
  free(images);
  tarflow_sampler_free(sampler);
  tarflow_model_free(model);
  return bad;
}
