// The target-region macros, and the only macros of the project.
//
// Everything is compiled for the baseline of the architecture. Code that needs a wider ISA stands between
// FL_TARGET_BEGIN("avx2,fma"), or "+dotprod", and FL_TARGET_END, in a translation unit of its own (csrc/<isa>.cpp),
// after every standard header was included, so that no shared inline function is ever compiled for a wide target.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FL_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define FL_TARGET_BEGIN(isa) FL_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define FL_TARGET_END FL_PRAGMA(clang attribute pop)
#else
#define FL_TARGET_BEGIN(isa) FL_PRAGMA(GCC push_options) FL_PRAGMA(GCC target(isa))
#define FL_TARGET_END FL_PRAGMA(GCC pop_options)
#endif
