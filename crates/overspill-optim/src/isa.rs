//! Which instructions a kernel is compiled to: one plain loop, three versions, and an explicit choice among them.
//!
//! A [`Kernel`] carries its slices and its loop. [`Isa::run`] calls a version of that loop that `multiversion` compiled
//! for the wanted instruction set; the same macro decides which sets the CPU has, so what [`Isa::detect`] names is what
//! runs. A kernel passes its elements through a [`Load`]: the scalar version takes them one by one through a barrier
//! that the vectorizer cannot cross, the others take them as they are. The arithmetic is written once, and Rust never
//! contracts or reorders floating-point operations (a fused one is written as such), so the versions differ in speed alone.

use std::fmt;
use std::hint::black_box;

use multiversion::multiversion;
use multiversion::target::match_target;

/// An instruction set that this CPU has; within one family of CPUs in rising order of vector width.
///
/// The wider sets cannot be named outside this crate; [`Isa::detect`] and [`Isa::available`] hand them out after
/// looking at the CPU.
///
/// ```compile_fail,E0603
/// let isa = overspill_optim::Isa::Avx512;
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// One element at a time: the reference for the others, and all there is on a CPU that has neither.
    Scalar,
    /// Eight `f32` at a time: AVX2 and FMA.
    #[non_exhaustive]
    Avx2,
    /// Sixteen `f32` at a time: AVX-512 as Ice Lake and later have it. Earlier CPUs slow down their clock for it.
    #[non_exhaustive]
    Avx512,
    /// Four `f32` at a time: NEON, which every 64-bit ARM has.
    #[non_exhaustive]
    Neon,
}

impl Isa {
    /// The widest instruction set of this CPU.
    #[must_use]
    pub fn detect() -> Self {
        widest()
    }

    /// Every instruction set of this CPU, narrowest first; the first is [`Isa::Scalar`].
    pub fn available() -> impl Iterator<Item = Self> {
        let wide: &[Self] = match widest() {
            Self::Scalar => &[],
            Self::Avx2 => &[Self::Avx2],
            Self::Avx512 => &[Self::Avx2, Self::Avx512],
            Self::Neon => &[Self::Neon],
        };
        std::iter::once(Self::Scalar).chain(wide.iter().copied())
    }

    /// Runs the version of `kernel` that was compiled for this instruction set.
    pub(crate) fn run<K: Kernel>(self, kernel: K) -> K::Output {
        match self {
            Self::Scalar => run_scalar(kernel),
            Self::Avx2 => run_avx2(kernel),
            Self::Avx512 => run_avx512(kernel),
            Self::Neon => run_neon(kernel),
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        })
    }
}

/// A loop over slices that it owns or borrows. `run` must be `#[inline(always)]`, so that it is compiled with the
/// instructions of the version that calls it.
pub(crate) trait Kernel {
    /// What the loop leaves besides the slices it wrote.
    type Output;

    /// Runs the loop, passing at least one value of every element through `L`.
    fn run<L: Load>(self) -> Self::Output;
}

/// How a value of one element passes: unchanged, but with or without a barrier to vectorization.
pub(crate) trait Load {
    /// Returns `value`.
    fn load<T: Copy>(value: T) -> T;
}

/// Keeps each element on its own.
struct OneByOne;

impl Load for OneByOne {
    #[inline(always)]
    fn load<T: Copy>(value: T) -> T {
        black_box(value)
    }
}

/// Leaves the compiler free to take as many elements at once as a register holds.
struct Vectors;

impl Load for Vectors {
    #[inline(always)]
    fn load<T: Copy>(value: T) -> T {
        value
    }
}

/// The one scalar version of a kernel; the vector versions lead here on a CPU that they are not for, which keeps the
/// compiler from making a version of each of them for the least CPU.
#[inline(never)]
fn run_scalar<K: Kernel>(kernel: K) -> K::Output {
    kernel.run::<OneByOne>()
}

#[multiversion(targets("x86_64+avx2+fma"), dispatcher = "direct")]
fn run_avx2<K: Kernel>(kernel: K) -> K::Output {
    match_target! {
        "x86_64+avx2+fma" => kernel.run::<Vectors>(),
        _ => run_scalar(kernel),
    }
}

#[multiversion(targets("x86_64+avx512f"), dispatcher = "direct")]
fn run_avx512<K: Kernel>(kernel: K) -> K::Output {
    match_target! {
        "x86_64+avx512f" => kernel.run::<Vectors>(),
        _ => run_scalar(kernel),
    }
}

#[multiversion(targets("aarch64+neon"), dispatcher = "direct")]
fn run_neon<K: Kernel>(kernel: K) -> K::Output {
    match_target! {
        "aarch64+neon" => kernel.run::<Vectors>(),
        _ => run_scalar(kernel),
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2+fma", "aarch64+neon"), dispatcher = "direct")]
fn widest() -> Isa {
    match_target! {
        "x86_64+avx512f" => Isa::Avx512,
        "x86_64+avx2+fma" => Isa::Avx2,
        "aarch64+neon" => Isa::Neon,
        _ => Isa::Scalar,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_detected_instruction_set_is_the_widest_available_one() {
        let available: Vec<Isa> = Isa::available().collect();
        assert_eq!(available.first(), Some(&Isa::Scalar));
        assert_eq!(available.last(), Some(&Isa::detect()));
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn detection_agrees_with_the_cpu() {
        let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
        // Ice Lake's extensions: its vectors, and the bytewise ciphers that a hypervisor may hide.
        let vectors = is_x86_feature_detected!("avx512f") && is_x86_feature_detected!("avx512vbmi2");
        let ciphers = is_x86_feature_detected!("vaes") && is_x86_feature_detected!("vpclmulqdq");
        let avx512 = vectors && ciphers && is_x86_feature_detected!("gfni");
        assert_eq!(Isa::detect() >= Isa::Avx2, avx2);
        assert_eq!(Isa::detect() >= Isa::Avx512, avx512);
    }

    #[test]
    fn names_keep_the_width_they_are_asked_for() {
        assert_eq!(format!("[{:>8}]", Isa::Avx2), "[    avx2]");
    }
}
