//! The vectors of x86-64. A factor is a pair of tables for `pshufb`, which looks up 16 halves of bytes or more at once, or a
//! matrix for `gf2p8affineqb`.

use super::vector::{self, Vector};
use super::{Kernel, Operation};
use crate::parity::field::{HALVES, MATRICES, REDUCED, matrix};
use std::arch::x86_64::*;

pub(super) static SSE2: Kernel = Kernel { name: "SSE2", has: || is_x86_feature_detected!("sse2"), run: sse2 };
pub(super) static SSSE3: Kernel =
    Kernel { name: "SSSE3", has: || is_x86_feature_detected!("ssse3"), run: ssse3 };
pub(super) static AVX2: Kernel = Kernel { name: "AVX2", has: || is_x86_feature_detected!("avx2"), run: avx2 };
pub(super) static AVX512: Kernel = Kernel { name: "AVX-512", has: has_avx512, run: avx512 };
pub(super) static GFNI: Kernel =
    Kernel { name: "AVX-512 with GFNI", has: || has_avx512() && is_x86_feature_detected!("gfni"), run: gfni };

fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512bw")
}

// What follows may be called if the processor has what is enabled, with slices that are equally long, in whole blocks.

#[target_feature(enable = "sse2")]
unsafe fn sse2(operation: Operation<'_>) {
    // SAFETY: enabled above; the slices are the caller's promise.
    unsafe { vector::run::<Sse2>(operation) }
}

#[target_feature(enable = "ssse3")]
unsafe fn ssse3(operation: Operation<'_>) {
    // SAFETY: enabled above; the slices are the caller's promise.
    unsafe { vector::run::<Ssse3>(operation) }
}

#[target_feature(enable = "avx2")]
unsafe fn avx2(operation: Operation<'_>) {
    // SAFETY: enabled above; the slices are the caller's promise.
    unsafe { vector::run::<Avx2>(operation) }
}

#[target_feature(enable = "avx512f,avx512bw")]
unsafe fn avx512(operation: Operation<'_>) {
    // SAFETY: enabled above; the slices are the caller's promise.
    unsafe { vector::run::<Avx512>(operation) }
}

#[target_feature(enable = "avx512f,avx512bw,gfni")]
unsafe fn gfni(operation: Operation<'_>) {
    // SAFETY: enabled above; the slices are the caller's promise.
    unsafe { vector::run::<Gfni>(operation) }
}

// The blocks below rely on the promises of the trait and on nothing else: instructions that the processor has, and pointers
// to as many bytes as a vector has; loads and stores are the unaligned ones.

const REDUCED_BYTE: i8 = REDUCED.cast_signed();
const HALF: i8 = 15;

/// Multiplies bit by bit, as nothing before SSSE3 looks up bytes.
#[derive(Clone, Copy)]
struct Sse2(__m128i);

impl Vector for Sse2 {
    const BYTES: usize = 16;
    type Factor = u8;

    #[inline(always)]
    unsafe fn zero() -> Sse2 {
        // SAFETY: the trait's promises.
        Sse2(unsafe { _mm_setzero_si128() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Sse2 {
        // SAFETY: the trait's promises.
        Sse2(unsafe { _mm_loadu_si128(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the trait's promises.
        unsafe { _mm_storeu_si128(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Sse2) -> Sse2 {
        // SAFETY: the trait's promises.
        Sse2(unsafe { _mm_xor_si128(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn double(self) -> Sse2 {
        // SAFETY: the trait's promises.
        unsafe {
            // All ones in the bytes whose highest bit is set: the negative ones.
            let carried = _mm_cmpgt_epi8(_mm_setzero_si128(), self.0);
            let shifted = _mm_add_epi8(self.0, self.0);
            Sse2(_mm_xor_si128(shifted, _mm_and_si128(carried, _mm_set1_epi8(REDUCED_BYTE))))
        }
    }

    #[inline(always)]
    unsafe fn factor(factor: u8) -> u8 {
        factor
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: u8) -> Sse2 {
        // SAFETY: the trait's promises.
        unsafe {
            let mut sum = Sse2::zero();
            for bit in (0..8).rev() {
                sum = sum.double();
                if factor >> bit & 1 != 0 {
                    sum = sum.xor(self);
                }
            }
            sum
        }
    }
}

#[derive(Clone, Copy)]
struct Ssse3(Sse2);

impl Vector for Ssse3 {
    const BYTES: usize = Sse2::BYTES;
    type Factor = [__m128i; 2];

    #[inline(always)]
    unsafe fn zero() -> Ssse3 {
        // SAFETY: the trait's promises; with SSSE3 there is SSE2.
        Ssse3(unsafe { Sse2::zero() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Ssse3 {
        // SAFETY: as above.
        Ssse3(unsafe { Sse2::load(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: as above.
        unsafe { self.0.store(to) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Ssse3) -> Ssse3 {
        // SAFETY: as above.
        Ssse3(unsafe { self.0.xor(other.0) })
    }

    #[inline(always)]
    unsafe fn double(self) -> Ssse3 {
        // SAFETY: as above.
        Ssse3(unsafe { self.0.double() })
    }

    #[inline(always)]
    unsafe fn factor(factor: u8) -> [__m128i; 2] {
        let [low, high] = &HALVES[usize::from(factor)].0;
        // SAFETY: the trait's promises; the tables have 16 bytes each.
        unsafe { [_mm_loadu_si128(low.as_ptr().cast()), _mm_loadu_si128(high.as_ptr().cast())] }
    }

    #[inline(always)]
    unsafe fn multiply(self, [low, high]: [__m128i; 2]) -> Ssse3 {
        // SAFETY: the trait's promises.
        unsafe {
            let half = _mm_set1_epi8(HALF);
            let low = _mm_shuffle_epi8(low, _mm_and_si128(self.0.0, half));
            let high = _mm_shuffle_epi8(high, _mm_and_si128(_mm_srli_epi16::<4>(self.0.0), half));
            Ssse3(Sse2(_mm_xor_si128(low, high)))
        }
    }
}

#[derive(Clone, Copy)]
struct Avx2(__m256i);

impl Vector for Avx2 {
    const BYTES: usize = 32;
    type Factor = [__m256i; 2];

    #[inline(always)]
    unsafe fn zero() -> Avx2 {
        // SAFETY: the trait's promises.
        Avx2(unsafe { _mm256_setzero_si256() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Avx2 {
        // SAFETY: the trait's promises.
        Avx2(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the trait's promises.
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Avx2) -> Avx2 {
        // SAFETY: the trait's promises.
        Avx2(unsafe { _mm256_xor_si256(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn double(self) -> Avx2 {
        // SAFETY: the trait's promises.
        unsafe {
            let carried = _mm256_cmpgt_epi8(_mm256_setzero_si256(), self.0);
            let shifted = _mm256_add_epi8(self.0, self.0);
            Avx2(_mm256_xor_si256(shifted, _mm256_and_si256(carried, _mm256_set1_epi8(REDUCED_BYTE))))
        }
    }

    #[inline(always)]
    unsafe fn factor(factor: u8) -> [__m256i; 2] {
        // SAFETY: the trait's promises; with AVX2 there is SSSE3. Lookups stay within 16 bytes: both halves get the table.
        unsafe {
            let [low, high] = Ssse3::factor(factor);
            [_mm256_broadcastsi128_si256(low), _mm256_broadcastsi128_si256(high)]
        }
    }

    #[inline(always)]
    unsafe fn multiply(self, [low, high]: [__m256i; 2]) -> Avx2 {
        // SAFETY: the trait's promises.
        unsafe {
            let half = _mm256_set1_epi8(HALF);
            let low = _mm256_shuffle_epi8(low, _mm256_and_si256(self.0, half));
            let high = _mm256_shuffle_epi8(high, _mm256_and_si256(_mm256_srli_epi16::<4>(self.0), half));
            Avx2(_mm256_xor_si256(low, high))
        }
    }
}

#[derive(Clone, Copy)]
struct Avx512(__m512i);

impl Vector for Avx512 {
    const BYTES: usize = 64;
    type Factor = [__m512i; 2];

    #[inline(always)]
    unsafe fn zero() -> Avx512 {
        // SAFETY: the trait's promises.
        Avx512(unsafe { _mm512_setzero_si512() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Avx512 {
        // SAFETY: the trait's promises.
        Avx512(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the trait's promises.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Avx512) -> Avx512 {
        // SAFETY: the trait's promises.
        Avx512(unsafe { _mm512_xor_si512(self.0, other.0) })
    }

    #[inline(always)]
    unsafe fn double(self) -> Avx512 {
        // SAFETY: the trait's promises.
        unsafe {
            let carried = _mm512_movm_epi8(_mm512_movepi8_mask(self.0));
            let shifted = _mm512_add_epi8(self.0, self.0);
            Avx512(_mm512_xor_si512(shifted, _mm512_and_si512(carried, _mm512_set1_epi8(REDUCED_BYTE))))
        }
    }

    #[inline(always)]
    unsafe fn factor(factor: u8) -> [__m512i; 2] {
        // SAFETY: the trait's promises; with AVX-512 there is SSSE3.
        unsafe {
            let [low, high] = Ssse3::factor(factor);
            [_mm512_broadcast_i32x4(low), _mm512_broadcast_i32x4(high)]
        }
    }

    #[inline(always)]
    unsafe fn multiply(self, [low, high]: [__m512i; 2]) -> Avx512 {
        // SAFETY: the trait's promises.
        unsafe {
            let half = _mm512_set1_epi8(HALF);
            let low = _mm512_shuffle_epi8(low, _mm512_and_si512(self.0, half));
            let high = _mm512_shuffle_epi8(high, _mm512_and_si512(_mm512_srli_epi16::<4>(self.0), half));
            Avx512(_mm512_xor_si512(low, high))
        }
    }
}

#[derive(Clone, Copy)]
struct Gfni(Avx512);

const DOUBLE: i64 = matrix(2).cast_signed();

impl Vector for Gfni {
    const BYTES: usize = Avx512::BYTES;
    type Factor = __m512i;

    #[inline(always)]
    unsafe fn zero() -> Gfni {
        // SAFETY: the trait's promises.
        Gfni(unsafe { Avx512::zero() })
    }

    #[inline(always)]
    unsafe fn load(from: *const u8) -> Gfni {
        // SAFETY: the trait's promises.
        Gfni(unsafe { Avx512::load(from) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut u8) {
        // SAFETY: the trait's promises.
        unsafe { self.0.store(to) }
    }

    #[inline(always)]
    unsafe fn xor(self, other: Gfni) -> Gfni {
        // SAFETY: the trait's promises.
        Gfni(unsafe { self.0.xor(other.0) })
    }

    #[inline(always)]
    unsafe fn double(self) -> Gfni {
        // SAFETY: the trait's promises.
        unsafe { self.multiply(_mm512_set1_epi64(DOUBLE)) }
    }

    #[inline(always)]
    unsafe fn factor(factor: u8) -> __m512i {
        // SAFETY: the trait's promises.
        unsafe { _mm512_set1_epi64(MATRICES[usize::from(factor)].cast_signed()) }
    }

    #[inline(always)]
    unsafe fn multiply(self, factor: __m512i) -> Gfni {
        // SAFETY: the trait's promises.
        Gfni(Avx512(unsafe { _mm512_gf2p8affine_epi64_epi8::<0>(self.0.0, factor) }))
    }
}
