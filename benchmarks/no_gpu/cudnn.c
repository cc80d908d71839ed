/* A cuDNN that does nothing, as far as PyTorch's attention and cuDNN's own frontend ask it: any graph has one plan. */

#include <cudnn.h>
#include <stdlib.h>
#include <string.h>

static cudaStream_t current;

size_t cudnnGetVersion(void) { return CUDNN_VERSION; }
size_t cudnnGetCudartVersion(void) { return CUDART_VERSION; }
cudnnStatus_t cudnnGetProperty(libraryPropertyType which, int *value) {
    *value = which == MAJOR_VERSION ? CUDNN_MAJOR : which == MINOR_VERSION ? CUDNN_MINOR : CUDNN_PATCHLEVEL;
    return CUDNN_STATUS_SUCCESS;
}
const char *cudnnGetErrorString(cudnnStatus_t status) { return "a status without a GPU"; }
void cudnnGetLastErrorString(char *message, size_t size) { if (size) *message = 0; }

cudnnStatus_t cudnnCreate(cudnnHandle_t *handle) { *handle = malloc(1); return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnSetStream(cudnnHandle_t handle, cudaStream_t stream) { current = stream; return CUDNN_STATUS_SUCCESS; }
cudnnStatus_t cudnnGetStream(cudnnHandle_t handle, cudaStream_t *stream) { *stream = current; return CUDNN_STATUS_SUCCESS; }

cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t type, cudnnBackendDescriptor_t *descriptor) {
    *descriptor = malloc(1);
    return CUDNN_STATUS_SUCCESS;
}
cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
    free(descriptor);
    return CUDNN_STATUS_SUCCESS;
}

/* One of everything that is asked for, and of numbers 0; no notes. */
cudnnStatus_t cudnnBackendGetAttribute(
    cudnnBackendDescriptor_t descriptor, cudnnBackendAttributeName_t name, cudnnBackendAttributeType_t type,
    int64_t asked, int64_t *count, void *found) {
    int notes = type == CUDNN_TYPE_BEHAVIOR_NOTE || type == CUDNN_TYPE_NUMERICAL_NOTE;
    if (count) *count = notes ? 0 : type == CUDNN_TYPE_CHAR ? 2 : 1;
    if (!found || !asked || notes || type == CUDNN_TYPE_BACKEND_DESCRIPTOR) return CUDNN_STATUS_SUCCESS;
    if (type == CUDNN_TYPE_INT64) *(int64_t *)found = 0;
    else if (type == CUDNN_TYPE_CHAR) strcpy(found, "0");
    else *(int *)found = 0;
    return CUDNN_STATUS_SUCCESS;
}
