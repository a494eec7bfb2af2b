#!/bin/bash
# Runs a command on the card that build.sh made.    usage: run.sh OUT COMMAND [ARGUMENT ...]
#   SIM_STATS=1             counts of calls and bytes, on standard error at the end; =2 also every shape of call with the
#                           bytes of device memory that it may read or write
#   SIM_TRACE=1             every call as it comes
#   SIM_DEVICES=2           cards;  SIM_MEMORY=BYTES  what each of them has
#   SIM_GUARD=1             reading or writing past the end of device memory is a segmentation fault
#   SIM_STRICT=1            memory used on a second stream without waiting for the first aborts; else it is told at the end
#   SIM_SKIP=1              computes nothing, every value is 0: counts and peaks of big models and pictures, in seconds
#   SIM_REVERSE=1           blocks and threads from the last to the first: numbers that change with that are a race's
#   SIM_FINITE=1            the first outputs that are not finite, by kernel
#   SIM_FAULT=FUNC:STATUS:N the Nth call of FUNC fails with that status; FUNC is cuInit, cuDevicePrimaryCtxRetain, cuMemGetInfo,
#                           cuMemAlloc, cuMemFree, cuMemHostAlloc, cuMemcpyHtoD, cuMemcpyDtoH, cuMemcpyDtoD, cuMemsetD8,
#                           cuStreamCreate, cuStreamSynchronize, cuStreamWaitEvent, cuCtxSynchronize, cuEventCreate,
#                           cuEventRecord, cuEventSynchronize, cuModuleLoadData, cuModuleGetFunction, cuFuncSetAttribute,
#                           cuLaunchKernel, cuLaunchHostFunc, cuStreamBeginCapture, cuStreamEndCapture, cuGraphInstantiate,
#                           cuGraphLaunch, cublasCreate, cudnnCreate, or a library's call by its name
#                           (cublasGemmStridedBatchedEx, cublasLtMatmul, cudnnConvolutionForward,
#                           cudnnConvolutionBiasActivationForward)
#   SIM_TF32=1              cuDNN's float32 convolutions in TF32, as from compute capability 8.0 on
#   SIM_HALF_SUMS_IN_F32=1  cuDNN's float16 convolutions with float32 sums
#   SIM_CAPABILITY=80, SIM_NO_POOLS=1
#   SIM_DRIVER=13000        the version of the driver, which reads no PTX newer than its own
set -euo pipefail
out=$(cd "${1:?usage: run.sh OUT COMMAND [ARGUMENT ...]}" && pwd)
shift
LD_LIBRARY_PATH="$out${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" exec "$@"
