// Shared memory as the kernels declare it. On the GPU the two macros are plain __shared__ arrays;
// in the host executor (tests/simt) each becomes a poisoned heap array of the exact size, so that a
// read before a write and a step out of bounds are seen. Macros, because a declaration cannot be a
// template.
#pragma once

#ifdef CALM_SIMT
#define CALM_SHARED_ARRAY(Type, name, count) \
  Type* const name = ::simt::shared_array<Type>(__FILE__, __LINE__, (count))
#define CALM_DYNAMIC_SHARED_ARRAY(Type, name) Type* const name = ::simt::dynamic_shared<Type>()
#else
#define CALM_SHARED_ARRAY(Type, name, count) __shared__ Type name[count]
#define CALM_DYNAMIC_SHARED_ARRAY(Type, name) extern __shared__ Type name[]
#endif
