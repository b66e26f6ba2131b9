//! The loops, for any vector: what the vectors of `x86.rs` do with a few bytes, done with many.
//!
//! Everything is inlined into functions that enable the vector's instructions, and there are no closures: neither is sure to be
//! inlined, nor do they enable what their function's caller enables.

use super::{BLOCK_BYTES, MultiplyInto, Operation, Pq, Solve, Xor, XorInto};

/// As many bytes as a register of the processor holds.
///
/// # Safety
/// Of every function: the processor has the vector's instructions, and pointers are to [`Self::BYTES`] bytes that may be read,
/// or written. They need not be aligned.
pub(super) trait Vector: Copy {
    const BYTES: usize;
    /// What [`Self::multiply`] makes of a factor once, for many.
    type Factor: Copy;

    unsafe fn zero() -> Self;
    unsafe fn load(from: *const u8) -> Self;
    unsafe fn store(self, to: *mut u8);
    unsafe fn xor(self, other: Self) -> Self;
    /// 2 times each byte.
    unsafe fn double(self) -> Self;
    unsafe fn factor(factor: u8) -> Self::Factor;
    /// `factor` times each byte.
    unsafe fn multiply(self, factor: Self::Factor) -> Self;
}

/// Vectors at one time: enough chains of dependent instructions to keep the processor busy, with registers for all of them.
const TOGETHER: usize = 4;

/// Does it.
///
/// # Safety
/// The processor has the instructions of `V`; all slices are equally long, in whole blocks.
#[inline(always)]
pub(super) unsafe fn run<V: Vector>(operation: Operation<'_>) {
    const { assert!(BLOCK_BYTES.is_multiple_of(V::BYTES)) };
    // SAFETY: the caller's promises are those of `walk`.
    unsafe {
        match operation {
            Operation::Xor(xor) => walk::<V, _>(xor.p.len(), xor, ()),
            Operation::Pq(pq) => walk::<V, _>(pq.p.len(), pq, ()),
            Operation::Solve(solve) => {
                let [first, second] = *solve.matrix;
                let factors =
                    [V::factor(first[0]), V::factor(first[1]), V::factor(second[0]), V::factor(second[1])];
                walk::<V, _>(solve.first.len(), solve, factors);
            }
            Operation::XorInto(xor) => walk::<V, _>(xor.p.len(), xor, ()),
            Operation::MultiplyInto(multiply) => {
                let factor = V::factor(multiply.factor);
                walk::<V, _>(multiply.q.len(), multiply, factor);
            }
        }
    }
}

/// An operation, at one position.
trait Step<V: Vector> {
    /// What is the same at all positions.
    type Constants: Copy;

    /// Does it with the `N` vectors from `at` on.
    ///
    /// # Safety
    /// The processor has the instructions of `V`, and all slices have so many bytes.
    unsafe fn step<const N: usize>(&mut self, at: usize, constants: Self::Constants);
}

/// # Safety
/// The processor has the instructions of `V`; all of the step's slices have `len` bytes, which are whole vectors.
#[inline(always)]
unsafe fn walk<V: Vector, S: Step<V>>(len: usize, mut step: S, constants: S::Constants) {
    let mut at = 0;
    while len - at >= V::BYTES * TOGETHER {
        // SAFETY: all the slices have that many bytes behind `at`; the rest is promised by the caller.
        unsafe { step.step::<TOGETHER>(at, constants) };
        at += V::BYTES * TOGETHER;
    }
    while at < len {
        // SAFETY: as above, since `len` is whole vectors.
        unsafe { step.step::<1>(at, constants) };
        at += V::BYTES;
    }
}

/// # Safety
/// As for [`Step::step`].
#[inline(always)]
unsafe fn load<V: Vector, const N: usize>(from: &[u8], at: usize) -> [V; N] {
    // SAFETY: the caller's promise: `N` vectors from `at` on are in the slice.
    unsafe {
        let mut vectors = [V::zero(); N];
        for (index, vector) in vectors.iter_mut().enumerate() {
            *vector = V::load(from.as_ptr().add(at + index * V::BYTES));
        }
        vectors
    }
}

/// # Safety
/// As for [`Step::step`].
#[inline(always)]
unsafe fn store<V: Vector, const N: usize>(vectors: [V; N], to: &mut [u8], at: usize) {
    // SAFETY: the caller's promise: `N` vectors from `at` on are in the slice.
    unsafe {
        for (index, vector) in vectors.into_iter().enumerate() {
            vector.store(to.as_mut_ptr().add(at + index * V::BYTES));
        }
    }
}

/// # Safety
/// The processor has the instructions of `V`.
#[inline(always)]
unsafe fn add<V: Vector, const N: usize>(to: &mut [V; N], vectors: [V; N]) {
    for (to, vector) in to.iter_mut().zip(vectors) {
        // SAFETY: the caller's promise.
        *to = unsafe { to.xor(vector) };
    }
}

/// p and q of the data.
///
/// # Safety
/// As for [`Step::step`].
#[inline(always)]
unsafe fn sums<V: Vector, const N: usize>(data: &[Option<&[u8]>], at: usize) -> ([V; N], [V; N]) {
    // SAFETY: the caller's promises.
    unsafe {
        let (mut p, mut q) = ([V::zero(); N], [V::zero(); N]);
        for data in data.iter().rev() {
            for vector in &mut q {
                *vector = vector.double();
            }
            if let Some(data) = data {
                let vectors = load(data, at);
                add(&mut p, vectors);
                add(&mut q, vectors);
            }
        }
        (p, q)
    }
}

impl<V: Vector> Step<V> for Xor<'_> {
    type Constants = ();

    #[inline(always)]
    unsafe fn step<const N: usize>(&mut self, at: usize, (): ()) {
        // SAFETY: the caller's promises.
        unsafe {
            let mut p = [V::zero(); N];
            for data in self.data {
                add(&mut p, load(data, at));
            }
            store(p, self.p, at);
        }
    }
}

impl<V: Vector> Step<V> for Pq<'_> {
    type Constants = ();

    #[inline(always)]
    unsafe fn step<const N: usize>(&mut self, at: usize, (): ()) {
        // SAFETY: the caller's promises.
        unsafe {
            let (p, q) = sums::<V, N>(self.data, at);
            store(p, self.p, at);
            store(q, self.q, at);
        }
    }
}

impl<V: Vector> Step<V> for Solve<'_> {
    type Constants = [V::Factor; 4];

    #[inline(always)]
    unsafe fn step<const N: usize>(&mut self, at: usize, factors: [V::Factor; 4]) {
        // SAFETY: the caller's promises.
        unsafe {
            let (mut p, mut q) = sums::<V, N>(self.data, at);
            if let Some(known) = self.p {
                add(&mut p, load(known, at));
            }
            if let Some(known) = self.q {
                add(&mut q, load(known, at));
            }
            let mut result = p;
            for (index, result) in result.iter_mut().enumerate() {
                *result = p[index].multiply(factors[0]).xor(q[index].multiply(factors[1]));
            }
            store(result, self.first, at);
            if let Some(second) = &mut self.second {
                for (index, result) in result.iter_mut().enumerate() {
                    *result = p[index].multiply(factors[2]).xor(q[index].multiply(factors[3]));
                }
                store(result, second, at);
            }
        }
    }
}

impl<V: Vector> Step<V> for XorInto<'_> {
    type Constants = ();

    #[inline(always)]
    unsafe fn step<const N: usize>(&mut self, at: usize, (): ()) {
        // SAFETY: the caller's promises.
        unsafe {
            let mut p: [V; N] = load(self.p, at);
            add(&mut p, load(self.delta, at));
            store(p, self.p, at);
        }
    }
}

impl<V: Vector> Step<V> for MultiplyInto<'_> {
    type Constants = V::Factor;

    #[inline(always)]
    unsafe fn step<const N: usize>(&mut self, at: usize, factor: V::Factor) {
        // SAFETY: the caller's promises.
        unsafe {
            let mut q: [V; N] = load(self.q, at);
            let delta: [V; N] = load(self.delta, at);
            for (q, delta) in q.iter_mut().zip(delta) {
                *q = q.xor(delta.multiply(factor));
            }
            store(q, self.q, at);
        }
    }
}
