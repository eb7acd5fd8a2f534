// Tells the thread sanitizer that an object goes from one thread to another through a library that
// it cannot see into. Nothing happens without it.
#pragma once

#ifdef ORLOP_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

namespace orlop {

#ifdef ORLOP_THREAD_SANITIZER
inline void TellGiven(void* object) { __tsan_release(object); }
inline void TellTaken(void* object) { __tsan_acquire(object); }
#else
inline void TellGiven(void*) {}
inline void TellTaken(void*) {}
#endif

}  // namespace orlop
