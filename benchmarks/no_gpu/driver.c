/* A CUDA driver that does nothing but count launches: Triton's own launcher runs on it where there is no GPU.

   What is not defined here is, by without_gpu.py, a function that returns success. */

static int launches, programs;
static long long first;

int count_of_launches(void) { return launches; }
int programs_of_last(void) { return programs; }
long long first_parameter_of_last(void) { return first; }

struct config { unsigned grid_x, grid_y, grid_z; };

int cuLaunchKernelEx(const struct config *config, void *function, void **given, void **extra) {
    launches++;
    programs = config->grid_x;
    first = *(long long *)given[0];
    return 0;
}

int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    value[0] = attribute == 75 ? 9 : attribute == 76 ? 0 : attribute == 16 ? 132 : 232448; /* sm_90 */
    return 0;
}
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)8; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
int cuPointerGetAttribute(void **value, int attribute, void *pointer) { *value = pointer; return 0; }

int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetCurrent(void **context) { *context = (void *)8; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuInit) NOTHING(cuGetErrorString) NOTHING(cuLaunchKernel)
NOTHING(cuCtxSetCurrent) NOTHING(cuCtxGetDevice) NOTHING(cuCtxGetLimit)
NOTHING(cuCtxSetLimit) NOTHING(cuCtxPushCurrent) NOTHING(cuCtxPopCurrent)
NOTHING(cuDeviceGet) NOTHING(cuDevicePrimaryCtxRetain) NOTHING(cuModuleLoadData) NOTHING(cuModuleUnload)
NOTHING(cuFuncLoad) NOTHING(cuFuncSetCacheConfig) NOTHING(cuFuncSetAttribute) NOTHING(cuStreamIsCapturing)
NOTHING(cuOccupancyMaxActiveClusters) NOTHING(cuTensorMapEncodeTiled) NOTHING(cuTensorMapEncodeIm2col)
