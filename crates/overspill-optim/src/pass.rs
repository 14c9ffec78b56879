//! The fused pass: one loop over the columns of a tile, compiled for each rule and each format.
//!
//! Per element: widen the gradient, multiply it by the step's scale, note whether it is finite, put the master together,
//! update it and the moments, store the weight, the rest of the master and the moments. Every byte is read once and written
//! once. [`Columns`] are cut into chunks for the threads; a chunk is a [`Kernel`]. Moments in blocks of eight bits need the
//! largest magnitude of their block before any of it can be stored, so their loop goes block by block over arrays that stay
//! in the first-level cache.
//!
//! What a chunk leaves is the largest magnitude among its gradients as the bits of an `f32`: bits of non-negative floats
//! are ordered like the numbers, with infinities and NaNs at the end.

use std::array;

use crate::CHUNK_ELEMENTS;
use crate::format::blocks::{self, Code};
use crate::format::gradient::{Gradient, GradientFormat};
use crate::format::half::{Bf16, F16, Half};
use crate::format::moment::{BLOCK_ELEMENTS, MomentCells};
use crate::format::noise::{Noise, Origin};
use crate::format::weight::WeightCells;
use crate::isa::{Isa, Kernel, Load};
use crate::rule::ElementRule;

const MAGNITUDE: u32 = !(1 << 31);

/// The random bits of the weights; moment `k` has column `k + 1`.
const WEIGHT_COLUMN: u64 = 0;

/// Columns that can be cut in two, and a chunk of which can be updated.
pub(crate) trait Columns: Sized + Send {
    /// Number of elements.
    fn len(&self) -> usize;

    /// Where the first element is.
    fn origin(&self) -> Origin;

    /// The first `elements` elements, and the rest.
    fn split_at(self, elements: usize) -> (Self, Self);

    /// Updates a chunk: elements with one [`Noise`].
    fn update(self, isa: Isa) -> u32;
}

/// Updates all elements on all cores; the largest magnitude among the scaled gradients, as bits.
pub(crate) fn update<C: Columns>(isa: Isa, columns: C) -> u32 {
    let elements = columns.len();
    let run = columns.origin().run_length();
    if elements as u64 > run {
        let (head, tail) = columns.split_at(run as usize);
        return update(isa, head).max(update(isa, tail));
    }
    if elements <= CHUNK_ELEMENTS {
        return columns.update(isa);
    }
    let (head, tail) = columns.split_at((elements / 2).next_multiple_of(CHUNK_ELEMENTS));
    let (head, tail) = rayon::join(|| update(isa, head), || update(isa, tail));
    head.max(tail)
}

/// Columns whose elements are stored each on its own. All slices are of one length.
pub(crate) struct Streams<'a, const N: usize, R, W: WeightCells, M: MomentCells, G: GradientFormat> {
    pub(crate) rule: R,
    pub(crate) origin: Origin,
    pub(crate) weights: &'a mut [W::Weight],
    pub(crate) extras: &'a mut [W::Extra],
    pub(crate) moments: [&'a mut [M::Cell]; N],
    pub(crate) gradient: &'a [G::Cell],
}

impl<const N: usize, R, W, M, G> Columns for Streams<'_, N, R, W, M, G>
where
    R: ElementRule<N>,
    W: WeightCells,
    M: MomentCells,
    G: GradientFormat,
{
    fn len(&self) -> usize {
        self.gradient.len()
    }

    fn origin(&self) -> Origin {
        self.origin
    }

    fn split_at(self, elements: usize) -> (Self, Self) {
        let Self { rule, origin, weights, extras, moments, gradient } = self;
        let (weights, later_weights) = weights.split_at_mut(elements);
        let (extras, later_extras) = extras.split_at_mut(elements);
        let (moments, later_moments) = split_all(moments, elements);
        let (gradient, later_gradient) = gradient.split_at(elements);
        let later = Self {
            rule,
            origin: origin.advance(elements as u64),
            weights: later_weights,
            extras: later_extras,
            moments: later_moments,
            gradient: later_gradient,
        };
        (Self { rule, origin, weights, extras, moments, gradient }, later)
    }

    fn update(self, isa: Isa) -> u32 {
        isa.run(self)
    }
}

impl<const N: usize, R, W, M, G> Kernel for Streams<'_, N, R, W, M, G>
where
    R: ElementRule<N>,
    W: WeightCells,
    M: MomentCells,
    G: GradientFormat,
{
    type Output = u32;

    #[inline(always)]
    fn run<L: Load>(self) -> u32 {
        let Self { rule, origin, weights, extras, moments, gradient } = self;
        let weight_noise = Noise::new(origin, WEIGHT_COLUMN);
        let moment_noise: [Noise; N] = array::from_fn(|k| Noise::new(origin, k as u64 + 1));
        // Slices of one visible length need no checks of bounds.
        let elements = gradient.len();
        let weights = &mut weights[..elements];
        let extras = &mut extras[..elements];
        let moments = moments.map(|cells| &mut cells[..elements]);
        let scale = rule.gradient_scale();
        let mut largest = 0;
        for i in 0..elements {
            let grad = G::widen(L::load(gradient[i])) * scale;
            largest = largest.max(grad.to_bits() & MAGNITUDE);
            let master = W::load(weights[i], extras[i]);
            let old = array::from_fn(|k| M::load(moments[k][i]));
            let (master, new) = rule.element(master, grad, old);
            (weights[i], extras[i]) = W::store(master, || weight_noise.bits(i as u32));
            for k in 0..N {
                moments[k][i] = M::store(new[k], || moment_noise[k].bits(i as u32));
            }
        }
        largest
    }
}

/// Columns whose moments share a scale in blocks. The columns of elements are of one length; there is a scale for every
/// block that the length begins.
pub(crate) struct Blocks<'a, const N: usize, R, W: WeightCells> {
    pub(crate) rule: R,
    pub(crate) origin: Origin,
    pub(crate) weights: &'a mut [W::Weight],
    pub(crate) extras: &'a mut [W::Extra],
    pub(crate) moments: [&'a mut [u8]; N],
    pub(crate) scales: [&'a mut [f32]; N],
    pub(crate) gradient: Gradient<'a>,
}

impl<const N: usize, R: ElementRule<N>, W: WeightCells> Columns for Blocks<'_, N, R, W> {
    fn len(&self) -> usize {
        self.gradient.len()
    }

    fn origin(&self) -> Origin {
        self.origin
    }

    /// Chunks and runs of noise end where a block does.
    fn split_at(self, elements: usize) -> (Self, Self) {
        let Self { rule, origin, weights, extras, moments, scales, gradient } = self;
        let (weights, later_weights) = weights.split_at_mut(elements);
        let (extras, later_extras) = extras.split_at_mut(elements);
        let (moments, later_moments) = split_all(moments, elements);
        let (scales, later_scales) = split_all(scales, elements / BLOCK_ELEMENTS);
        let (gradient, later_gradient) = gradient.split_at(elements);
        let later = Self {
            rule,
            origin: origin.advance(elements as u64),
            weights: later_weights,
            extras: later_extras,
            moments: later_moments,
            scales: later_scales,
            gradient: later_gradient,
        };
        (Self { rule, origin, weights, extras, moments, scales, gradient }, later)
    }

    fn update(self, isa: Isa) -> u32 {
        isa.run(self)
    }
}

impl<const N: usize, R: ElementRule<N>, W: WeightCells> Kernel for Blocks<'_, N, R, W> {
    type Output = u32;

    #[inline(always)]
    fn run<L: Load>(self) -> u32 {
        let Self { rule, origin, weights, extras, moments, scales, gradient } = self;
        let weight_noise = Noise::new(origin, WEIGHT_COLUMN);
        let moment_noise: [Noise; N] = array::from_fn(|k| Noise::new(origin, k as u64 + 1));
        let gradient_scale = rule.gradient_scale();
        let elements = gradient.len();
        let mut largest = 0;
        for (block, start) in (0..elements).step_by(BLOCK_ELEMENTS).enumerate() {
            let count = BLOCK_ELEMENTS.min(elements - start);
            let mut grad = [0.0; BLOCK_ELEMENTS];
            widen::<L>(gradient.part(start, count), &mut grad[..count]);
            for grad in &mut grad {
                *grad *= gradient_scale;
                largest = largest.max(grad.to_bits() & MAGNITUDE);
            }
            let mut values = [[0.0; BLOCK_ELEMENTS]; N];
            for k in 0..N {
                let (code_format, scale) = (Code::of(R::SIGNED[k]), scales[k][block]);
                for (value, code) in values[k].iter_mut().zip(&moments[k][start..start + count]) {
                    *value = code_format.decode(L::load(*code), scale);
                }
            }
            let (weights, extras) = (&mut weights[start..start + count], &mut extras[start..start + count]);
            for i in 0..count {
                let master = W::load(weights[i], extras[i]);
                let (master, new) = rule.element(master, L::load(grad[i]), array::from_fn(|k| values[k][i]));
                (weights[i], extras[i]) =
                    W::store(master, || weight_noise.bits(start.wrapping_add(i) as u32));
                for k in 0..N {
                    values[k][i] = new[k];
                }
            }
            for k in 0..N {
                let (code_format, scale) = (Code::of(R::SIGNED[k]), blocks::scale(&values[k]));
                scales[k][block] = scale;
                let mut codes = [0; BLOCK_ELEMENTS];
                for i in 0..BLOCK_ELEMENTS {
                    let noise = moment_noise[k].bits(start.wrapping_add(i) as u32);
                    codes[i] = code_format.encode(L::load(values[k][i]), scale, noise);
                }
                moments[k][start..start + count].copy_from_slice(&codes[..count]);
            }
        }
        largest
    }
}

impl<'a> Gradient<'a> {
    fn split_at(self, elements: usize) -> (Self, Self) {
        match self {
            Self::F32(x) => {
                let (head, tail) = x.split_at(elements);
                (Self::F32(head), Self::F32(tail))
            }
            Self::Bf16(x) => {
                let (head, tail) = x.split_at(elements);
                (Self::Bf16(head), Self::Bf16(tail))
            }
            Self::F16(x) => {
                let (head, tail) = x.split_at(elements);
                (Self::F16(head), Self::F16(tail))
            }
        }
    }

    #[inline(always)]
    fn part(self, start: usize, elements: usize) -> Self {
        let range = start..start + elements;
        match self {
            Self::F32(x) => Self::F32(&x[range]),
            Self::Bf16(x) => Self::Bf16(&x[range]),
            Self::F16(x) => Self::F16(&x[range]),
        }
    }
}

/// Widens a gradient into `out`, which is of its length.
#[inline(always)]
fn widen<L: Load>(gradient: Gradient<'_>, out: &mut [f32]) {
    match gradient {
        Gradient::F32(x) => out.copy_from_slice(x),
        Gradient::Bf16(x) => widen_halves::<L, Bf16>(x, out),
        Gradient::F16(x) => widen_halves::<L, F16>(x, out),
    }
}

#[inline(always)]
fn widen_halves<L: Load, H: Half>(halves: &[u16], out: &mut [f32]) {
    for (out, half) in out.iter_mut().zip(halves) {
        *out = H::widen(L::load(*half));
    }
}

fn split_all<T, const N: usize>(slices: [&mut [T]; N], at: usize) -> ([&mut [T]; N], [&mut [T]; N]) {
    let mut later = array::from_fn(|_| [].as_mut_slice());
    let mut later_slots = later.iter_mut();
    let head = slices.map(|slice| {
        let (head, tail) = slice.split_at_mut(at);
        if let Some(slot) = later_slots.next() {
            *slot = tail;
        }
        head
    });
    (head, later)
}
