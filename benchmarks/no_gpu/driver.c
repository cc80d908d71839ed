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
int cuGetErrorString(int error, const char **text) { *text = "an error without a GPU"; return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }

/* A thread has a context once it was given one; without, no tensor map is made. */

static __thread void *current;
int cuCtxGetCurrent(void **context) { *context = current; return 0; }
int cuCtxSetCurrent(void *context) { current = context; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)8; return 0; }
int cuTensorMapEncodeTiled(void) { return current ? 0 : 201; /* invalid device context */ }
int cuTensorMapEncodeIm2col(void) { return current ? 0 : 201; }

#define NOTHING(name) int name(void) { return 0; }
NOTHING(cuInit) NOTHING(cuLaunchKernel)
NOTHING(cuCtxGetDevice) NOTHING(cuCtxGetLimit) NOTHING(cuCtxSetLimit) NOTHING(cuCtxPushCurrent)
NOTHING(cuCtxPopCurrent) NOTHING(cuDeviceGet) NOTHING(cuModuleLoadData) NOTHING(cuModuleUnload)
NOTHING(cuFuncLoad) NOTHING(cuFuncSetCacheConfig) NOTHING(cuFuncSetAttribute) NOTHING(cuStreamIsCapturing)
NOTHING(cuOccupancyMaxActiveClusters)
