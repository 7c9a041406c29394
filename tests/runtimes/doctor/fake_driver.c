/* Stands in for libcuda.so.1 and libnvidia-ml.so.1: two GPUs, or what FAKE_STATUS makes of cuInit. */
#include <stdlib.h>
#include <string.h>

int cuInit(unsigned flags) { (void)flags; const char *status = getenv("FAKE_STATUS"); return status ? atoi(status) : 0; }
int cuGetErrorName(int status, const char **name) { *name = status == 999 ? "CUDA_ERROR_UNKNOWN" : 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13010; return 0; }
int cuDeviceGetCount(int *count) { *count = 2; return 0; }
int cuDeviceGet(int *device, int index) { *device = 70 + index; return 0; }
int cuDeviceGetName(char *name, int length, int device) {
    strncpy(name, device == 70 ? "NVIDIA H200" : "NVIDIA L4", length);
    return 0;
}
int cuDeviceGetPCIBusId(char *name, int length, int device) {
    strncpy(name, device == 70 ? "0000:01:00.0" : "0000:02:00.0", length);
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = device == 70 ? 150000000000 : 24000000000; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 75) *value = device == 70 ? 9 : 8;
    else if (attribute == 76) *value = device == 70 ? 0 : 9;
    else return 1;
    return 0;
}

int nvmlInit_v2(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned length) { strncpy(text, "580.65.06", length); return 0; }
int nvmlDeviceGetHandleByPciBusId_v2(const char *bus, void **device) {
    static int first;
    *device = &first;
    return strcmp(bus, "0000:01:00.0") ? 6 : 0; /* the second GPU is not known here */
}
int nvmlDeviceGetMemoryInfo(void *device, unsigned long long *memory) {
    (void)device;
    memory[0] = 150000000000, memory[1] = 149000000000, memory[2] = 1000000000;
    return 0;
}
