// The number of the thread that runs, where there are several.
#pragma once
#if defined(_OPENMP)
#include <omp.h>
#endif

namespace {

inline int thread_index() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace
