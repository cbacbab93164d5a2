"""Memory that has run out, by any of the names that it has."""

import errno

import pytest
import torch

from tbptt_ckpt.memory.exhausted import is_out_of_memory

NAMES = (
    "[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory: you tried",
    "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    "std::bad_alloc",
    "could not create a primitive",
    "could not execute a primitive",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "
    "non-contiguous input.",
    "GET was unable to find an engine to execute this computation",
    "Unable to find a valid cuDNN algorithm to run convolution",
    "cuFFT error: CUFFT_ALLOC_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
    "MPS backend out of memory (MPS allocated: 9.00 GiB, other allocations: 1 KB)",
    "HIP error: out of memory",
    "hipErrorOutOfMemory",
    "cudaErrorMemoryAllocation",
    "CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`",
    "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "level_zero backend failed with error: 38 (UR_RESULT_ERROR_OUT_OF_HOST_MEMORY)",
)
OTHERS = (
    "could not create a primitive descriptor for an LSTM forward propagation primitive",
    "CUDA error: device-side assert triggered",
    "CUDA error: an illegal memory access was encountered",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle)`",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "level_zero backend failed with error: 20 (UR_RESULT_ERROR_DEVICE_LOST)",
    "index 3 is out of bounds for dimension 0 with size 3",
    "Expected all tensors to be on the same device",
)


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize("text", NAMES)
def test_each_of_its_names_is_known(kind, text):
    assert is_out_of_memory(kind(text))
    assert not is_out_of_memory(ValueError(text))  # of which no allocator is the author


@pytest.mark.parametrize("kind", [RuntimeError, torch.AcceleratorError])
@pytest.mark.parametrize("text", OTHERS)
def test_other_failures_are_not_taken_for_it(kind, text):
    assert not is_out_of_memory(kind(text))


def test_types_say_it_without_words():
    assert is_out_of_memory(torch.OutOfMemoryError())
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, ""))
    assert not is_out_of_memory(OSError(errno.ENOSPC, ""))
