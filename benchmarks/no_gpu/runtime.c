/* A CUDA runtime that does nothing: memory is the host's, copies are made at once, kernels are counted and not run.

   What is not defined here is, by without_gpu.py, a function that returns success and leaves what it was given alone. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define GIB ((size_t)1 << 30)
#define PAGE ((size_t)2 << 20) /* of the memory that cudaMalloc gives, to a multiple of which it is aligned */

static long launches;
long count_of_launches_by_runtime(void) { return launches; }

/* The device: a Hopper GPU. */

cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int device) {
    memset(found, 0, sizeof *found);
    strcpy(found->name, "no GPU");
    found->major = 9;
    found->multiProcessorCount = 132;
    found->totalGlobalMem = 80 * GIB;
    found->l2CacheSize = 50 << 20;
    found->warpSize = 32;
    found->regsPerBlock = found->regsPerMultiprocessor = 65536;
    found->sharedMemPerBlock = 49152;
    found->sharedMemPerBlockOptin = 232448;
    found->sharedMemPerMultiprocessor = 233472;
    found->maxThreadsPerBlock = found->maxThreadsDim[0] = found->maxThreadsDim[1] = 1024;
    found->maxThreadsDim[2] = 64;
    found->maxThreadsPerMultiProcessor = 2048;
    found->maxBlocksPerMultiProcessor = 32;
    found->maxGridSize[0] = 2147483647;
    found->maxGridSize[1] = found->maxGridSize[2] = 65535;
    found->unifiedAddressing = 1;
    return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp of;
    cudaGetDeviceProperties(&of, device);
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = of.major; break;
    case cudaDevAttrMultiProcessorCount: *value = of.multiProcessorCount; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = of.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = of.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = of.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = of.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = of.sharedMemPerMultiprocessor; break;
    case cudaDevAttrWarpSize: *value = of.warpSize; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }

/* What needs a context gives the thread that of the device; to ask for the device needs none. */

static int (*set_current)(void *);
static void bind_context(void) {
    static __thread int is_bound;
    if (is_bound) return;
    void *driver = set_current ? NULL : dlopen("libcuda.so.1", RTLD_NOW);
    if (driver) set_current = (int (*)(void *))dlsym(driver, "cuCtxSetCurrent");
    if (set_current) set_current((void *)8);
    is_bound = 1;
}

cudaError_t cudaSetDevice(int device) { bind_context(); return cudaSuccess; }

/* Memory. */

static struct { char *start; size_t size; } blocks[65536];
static int count_of_blocks;

cudaError_t cudaMalloc(void **pointer, size_t size) {
    bind_context();
    size = (size + PAGE - 1) / PAGE * PAGE;
    *pointer = mmap(NULL, size + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (*pointer == MAP_FAILED || count_of_blocks == sizeof blocks / sizeof *blocks) return cudaErrorMemoryAllocation;
    *pointer = (void *)(((size_t)*pointer + PAGE - 1) / PAGE * PAGE);
    blocks[count_of_blocks].start = *pointer;
    blocks[count_of_blocks++].size = size;
    return cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
    for (int number = 0; number < count_of_blocks; number++)
        if (blocks[number].start == pointer) {
            munmap(pointer, blocks[number].size);
            blocks[number] = blocks[--count_of_blocks];
            break;
        }
    return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *pointer) {
    memset(found, 0, sizeof *found);
    found->type = cudaMemoryTypeUnregistered;
    found->device = -2;
    for (int number = 0; number < count_of_blocks; number++)
        if ((const char *)pointer >= blocks[number].start && (const char *)pointer < blocks[number].start + blocks[number].size) {
            found->type = cudaMemoryTypeDevice;
            found->device = 0;
            found->devicePointer = (void *)pointer;
        }
    return cudaSuccess;
}

cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { *left = *all = 80 * GIB; return cudaSuccess; }
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
    *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
    return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
    memcpy(to, from, size);
    return cudaSuccess;
}
cudaError_t cudaMemset(void *at, int value, size_t size) { memset(at, value, size); return cudaSuccess; }
cudaError_t cudaMemsetAsync(void *at, int value, size_t size, cudaStream_t stream) {
    memset(at, value, size);
    return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) { return cudaMalloc(pointer, PAGE); }

/* Streams and events: handles that are different. */

static size_t handles = 4096;
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = (void *)(handles += 64); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
    return cudaStreamCreate(stream);
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = (void *)(handles += 64); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t start, cudaEvent_t end) {
    *milliseconds = 0;
    return cudaSuccess;
}
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
    *status = cudaStreamCaptureStatusNone;
    return cudaSuccess;
}

/* Kernels. */

void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
    *kernel = (cudaKernel_t)function;
    return cudaSuccess;
}

static __thread struct { dim3 grid, block; size_t shared; void *stream; } configured;
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
    configured.grid = grid;
    configured.block = block;
    configured.shared = shared;
    configured.stream = stream;
    return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = configured.grid;
    *block = configured.block;
    *shared = configured.shared;
    *(void **)stream = configured.stream;
    return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void *kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) {
    bind_context();
    launches++;
    return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **given, size_t shared, cudaStream_t stream) {
    bind_context();
    launches++;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *kernel, void **given) {
    bind_context();
    launches++;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *kernel) {
    memset(found, 0, sizeof *found);
    found->maxThreadsPerBlock = 1024;
    found->binaryVersion = found->ptxVersion = 90;
    found->numRegs = 64;
    return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(
    int *blocks, const void *kernel, int size, size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

/* Errors, and the way to the driver. */

const char *cudaGetErrorString(cudaError_t error) { return "an error without a GPU"; }
const char *cudaGetErrorName(cudaError_t error) { return "cudaError"; }

cudaError_t cudaGetDriverEntryPointByVersion(
    const char *name, void **function, unsigned version, unsigned long long flags,
    enum cudaDriverEntryPointQueryResult *result) {
    void *driver = dlopen("libcuda.so.1", RTLD_NOW);
    *function = driver ? dlsym(driver, name) : NULL;
    if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}
