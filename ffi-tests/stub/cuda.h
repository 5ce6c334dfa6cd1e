/* Types of the public driver API, and what the two files of the fake libcuda share. */
#ifndef UCM_STUB_CUDA_H
#define UCM_STUB_CUDA_H

#include "machine.h"

#ifdef UCM_STUB_HEADER
#include <cuda.h>
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUpointer_attribute, CUstreamCaptureMode, CUstreamCaptureStatus;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef void (*CUhostFn)(void *);
typedef int CUdriverProcAddressQueryResult;
typedef uint64_t cuuint64_t;
typedef struct {
    size_t srcXInBytes, srcY;
    int srcMemoryType;
    const void *srcHost;
    CUdeviceptr srcDevice;
    void *srcArray;
    size_t srcPitch;
    size_t dstXInBytes, dstY;
    int dstMemoryType;
    void *dstHost;
    CUdeviceptr dstDevice;
    void *dstArray;
    size_t dstPitch;
    size_t WidthInBytes, Height;
} CUDA_MEMCPY2D;
typedef struct {
    int type, id;
} CUmemLocation;
typedef struct {
    int srcAccessOrder;
    CUmemLocation srcLocHint, dstLocHint;
    unsigned int flags;
} CUmemcpyAttributes;
#define CUDAAPI
#define cuDevicePrimaryCtxRelease cuDevicePrimaryCtxRelease_v2
#define cuCtxPushCurrent cuCtxPushCurrent_v2
#define cuCtxPopCurrent cuCtxPopCurrent_v2
#define cuStreamDestroy cuStreamDestroy_v2
#define cuEventDestroy cuEventDestroy_v2
#define cuMemHostRegister cuMemHostRegister_v2
#define cuMemHostGetDevicePointer cuMemHostGetDevicePointer_v2
#define cuMemAlloc cuMemAlloc_v2
#define cuMemFree cuMemFree_v2
#define cuMemGetAddressRange cuMemGetAddressRange_v2
#define cuMemcpy2DAsync cuMemcpy2DAsync_v2
#define cuMemcpyHtoD cuMemcpyHtoD_v2
#define cuMemcpyDtoH cuMemcpyDtoH_v2
#define cuGetProcAddress cuGetProcAddress_v2
#endif

#define API STUB_EXPORT CUresult CUDAAPI
#define OK 0
#define INVALID_VALUE 1
#define OUT_OF_MEMORY 2
#define INVALID_CONTEXT 201
#define INVALID_HANDLE 400
#define NOT_FOUND 500
#define NOT_READY 600
#define CONTEXT_IS_DESTROYED 709
#define ALREADY_REGISTERED 712
#define NOT_REGISTERED 713
#define RELAXED 2
#define DEVICES 2
#define VERSION 12080
#define PITCH_MAX 0x7fffffff

/* Counts a call that needs the driver to be initialised. Nonzero: what it must return now. */
int cuda_enter(const char *call);
/* The same for a call that needs a current context, and that ends a capture unless the thread is relaxed. */
int cuda_enter_context(const char *call);
/* The stream of a handle; the default one has several. */
struct stub_stream *cuda_stream_of(const char *call, CUstream stream);

#define RETURN_IF(status)                                                                                              \
    do {                                                                                                               \
        int status_ = (status);                                                                                        \
        if (status_) {                                                                                                 \
            return (CUresult)status_;                                                                                  \
        }                                                                                                              \
    } while (0)
#define ENTER(call) RETURN_IF(cuda_enter(call))
#define ENTER_CONTEXT(call) RETURN_IF(cuda_enter_context(call))

#define NOT_NULL(call, pointer)                                                                                        \
    do {                                                                                                               \
        if (!(pointer)) {                                                                                              \
            stub_misuse(call, #pointer " is null");                                                                    \
        }                                                                                                              \
    } while (0)

#endif
