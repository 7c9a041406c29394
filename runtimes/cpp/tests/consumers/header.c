/* tarflow.h in the oldest C: compiled as C89 with -pedantic-errors, and linked against what it declares. */
#include <tarflow/tarflow.h>

int main(void) {
  tarflow_model_options model_options;
  tarflow_sample_options sample_options;
  tarflow_model *model = 0;
  float noise[4];

  tarflow_model_options_init(&model_options);
  tarflow_sample_options_init(&sample_options);
  if (tarflow_abi_version() != TARFLOW_ABI_VERSION) return 1;
  if (model_options.struct_size != sizeof model_options || sample_options.guide != TARFLOW_GUIDE_AB) return 2;
  if (tarflow_model_open("/nowhere", &model_options, &model) != TARFLOW_ERROR_BUNDLE || model != 0) return 3;
  if (tarflow_noise(0, 0, 1, 2, 2, noise) != TARFLOW_OK) return 4;
  return 0;
}
