//! The optimizer step against a hand-computed step, an `f64` reference, and itself on other paths.

use overspill_optim::{AdamWConfig, AdamWStep, Isa, LengthMismatch, adamw};
use proptest::prelude::*;

use crate::{CHUNK_ELEMENTS, bits, edge_lengths, noise, on_threads};

/// What a step reads and writes.
#[derive(Clone, Debug)]
struct State {
    param: Vec<f32>,
    grad: Vec<f32>,
    exp_avg: Vec<f32>,
    exp_avg_sq: Vec<f32>,
}

impl State {
    fn random(length: usize, seed: u64) -> Self {
        Self {
            param: noise(length, seed),
            grad: noise(length, seed + 1),
            exp_avg: noise(length, seed + 2),
            exp_avg_sq: noise(length, seed + 3).iter().map(|x| x * x).collect(),
        }
    }

    fn step(&mut self, isa: Isa, step: &AdamWStep) {
        adamw(isa, step, &mut self.param, &self.grad, &mut self.exp_avg, &mut self.exp_avg_sq)
            .expect("the columns of a state are of one length");
    }

    fn stepped(&self, isa: Isa, step: &AdamWStep) -> Self {
        let mut state = self.clone();
        state.step(isa, step);
        state
    }

    fn bits(&self) -> [Vec<u32>; 3] {
        [bits(&self.param), bits(&self.exp_avg), bits(&self.exp_avg_sq)]
    }
}

fn any_step() -> impl Strategy<Value = AdamWStep> {
    (
        0.0..0.999_f64,
        0.0..0.9999_f64,
        1e-12..1e-3_f64,
        0.0..0.1_f64,
        0.0..1.0_f64,
        1..100_000_u64,
        1e-6..8.0_f32,
    )
        .prop_map(|(beta1, beta2, eps, lr, weight_decay, step, scale)| {
            AdamWStep::new(&AdamWConfig { beta1, beta2, eps }, lr, weight_decay, step, scale)
        })
}

fn third_step() -> AdamWStep {
    AdamWStep::new(&AdamWConfig::default(), 3e-4, 0.1, 3, 0.7)
}

/// The update of [`third_step`], written for one number in the order of the definition.
fn element_in_f32(p: f32, g: f32, m: f32, v: f32) -> [f32; 3] {
    let (beta1, beta2) = (0.9_f64, 0.95_f64);
    let (lr, weight_decay, t, scale) = (3e-4_f64, 0.1_f64, 3, 0.7_f32);
    let g = std::hint::black_box(g * scale);
    let p = p * (1.0 - lr * weight_decay) as f32;
    let m = (g - m).mul_add((1.0 - beta1) as f32, m);
    let v = ((1.0 - beta2) as f32 * g).mul_add(g, v * 0.95_f32);
    let denominator = v.sqrt() / (1.0 - beta2.powi(t)).sqrt() as f32 + 1e-8_f32;
    [p - (lr / (1.0 - beta1.powi(t))) as f32 * m / denominator, m, v]
}

#[test]
fn one_step_equals_the_hand_computed_one() {
    // lr 0.1, decay 0.1, betas 0.5 and 0.75, gradient 2·0.5 = 1 on p = 1, m = 0.5, v = 0.25, second step:
    // p = 0.99, m = 0.75, v = 0.4375, 1 - 0.5² = 0.75, 1 - 0.75² = 0.4375, so p = 0.99 - 0.1/0.75·0.75/(1 + eps).
    let step = AdamWStep::new(&AdamWConfig { beta1: 0.5, beta2: 0.75, eps: 1e-8 }, 0.1, 0.1, 2, 0.5);
    for isa in Isa::available() {
        let mut state =
            State { param: vec![1.0], grad: vec![2.0], exp_avg: vec![0.5], exp_avg_sq: vec![0.25] };
        state.step(isa, &step);
        assert_eq!((state.exp_avg[0], state.exp_avg_sq[0]), (0.75, 0.4375), "{isa}");
        assert!((state.param[0] - 0.89).abs() < 1e-7, "{isa}: {}", state.param[0]);
    }
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_plain_update_at_every_length() {
    for length in edge_lengths() {
        let state = State::random(length, length as u64 + 1);
        let mut expected = [Vec::new(), Vec::new(), Vec::new()];
        for i in 0..length {
            let element =
                element_in_f32(state.param[i], state.grad[i], state.exp_avg[i], state.exp_avg_sq[i]);
            for (column, x) in expected.iter_mut().zip(element) {
                column.push(x.to_bits());
            }
        }
        for isa in Isa::available() {
            assert!(state.stepped(isa, &third_step()).bits() == expected, "{isa}, length {length}");
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_the_bits() {
    let state = State::random(5 * CHUNK_ELEMENTS + 33, 5);
    for isa in Isa::available() {
        let alone = on_threads(1, || state.stepped(isa, &third_step()));
        let shared = on_threads(5, || state.stepped(isa, &third_step()));
        assert!(alone.bits() == shared.bits(), "{isa}");
    }
}

#[test]
fn twenty_steps_stay_close_to_double_precision() {
    const LENGTH: usize = 1000;
    let config = AdamWConfig::default();
    let AdamWConfig { beta1, beta2, eps } = config;
    for isa in Isa::available() {
        let mut state =
            State { exp_avg: vec![0.0; LENGTH], exp_avg_sq: vec![0.0; LENGTH], ..State::random(LENGTH, 9) };
        let mut param: Vec<f64> = state.param.iter().map(|p| f64::from(*p)).collect();
        let (mut exp_avg, mut exp_avg_sq) = (vec![0.0_f64; LENGTH], vec![0.0_f64; LENGTH]);
        for t in 1..=20_u64 {
            let (lr, weight_decay, scale) = (1e-2 / t as f64, 0.1, 0.25);
            state.grad = noise(LENGTH, 100 + t);
            state.step(isa, &AdamWStep::new(&config, lr, weight_decay, t, scale));
            for i in 0..LENGTH {
                let g = f64::from(state.grad[i]) * f64::from(scale);
                exp_avg[i] = beta1 * exp_avg[i] + (1.0 - beta1) * g;
                exp_avg_sq[i] = beta2 * exp_avg_sq[i] + (1.0 - beta2) * g * g;
                let mean = exp_avg[i] / (1.0 - beta1.powf(t as f64));
                let mean_sq = exp_avg_sq[i] / (1.0 - beta2.powf(t as f64));
                param[i] -= lr * weight_decay * param[i] + lr * mean / (mean_sq.sqrt() + eps);
            }
        }
        for i in 0..LENGTH {
            assert!(
                (f64::from(state.param[i]) - param[i]).abs() < 2e-6,
                "{isa}: {} {}",
                state.param[i],
                param[i]
            );
            assert!((f64::from(state.exp_avg[i]) - exp_avg[i]).abs() < 1e-7, "{isa}");
            assert!((f64::from(state.exp_avg_sq[i]) / exp_avg_sq[i] - 1.0).abs() < 1e-5, "{isa}");
        }
    }
}

#[test]
fn a_zero_gradient_on_zero_state_only_decays() {
    let step = AdamWStep::new(&AdamWConfig::default(), 0.5, 0.5, 1, 1.0);
    for isa in Isa::available() {
        let mut state = State {
            param: vec![2.0; 40],
            grad: vec![0.0; 40],
            exp_avg: vec![0.0; 40],
            exp_avg_sq: vec![0.0; 40],
        };
        state.step(isa, &step);
        assert_eq!(state.param, [1.5; 40]);
    }
}

#[test]
fn step_zero_is_the_first_step() {
    let new = |step| AdamWStep::new(&AdamWConfig::default(), 1e-3, 0.1, step, 1.0);
    assert_eq!(new(0), new(1));
    assert_ne!(new(1), new(2));
}

#[test]
fn a_slice_of_another_length_is_named_and_nothing_changes() {
    let isa = Isa::detect();
    let (mut p, mut m, mut v) = (vec![1.0; 8], vec![1.0; 8], vec![1.0; 8]);
    let step = third_step();
    let mismatch = |operand| LengthMismatch { operand, length: 7, expected: 8 };

    let grad = adamw(isa, &step, &mut p, &[1.0; 7], &mut m, &mut v);
    assert_eq!(grad, Err(mismatch("grad")));
    let exp_avg = adamw(isa, &step, &mut p, &[1.0; 8], &mut m[..7], &mut v);
    assert_eq!(exp_avg, Err(mismatch("exp_avg")));
    let exp_avg_sq = adamw(isa, &step, &mut p, &[1.0; 8], &mut m, &mut v[..7]);
    assert_eq!(exp_avg_sq, Err(mismatch("exp_avg_sq")));

    assert_eq!([p, m, v], [[1.0; 8]; 3]);
    assert_eq!(mismatch("grad").to_string(), "grad has length 7, expected 8");
}

proptest! {
    #[test]
    fn every_instruction_set_equals_the_scalar_one(length in 0..300_usize, seed in 1..u64::MAX / 2, step in any_step()) {
        let state = State::random(length, seed);
        let scalar = state.stepped(Isa::Scalar, &step).bits();
        for isa in Isa::available() {
            prop_assert_eq!(&state.stepped(isa, &step).bits(), &scalar, "{}", isa);
        }
    }

    #[test]
    fn a_split_anywhere_gives_the_same_bits(length in 1..300_usize, at in 0.0..1.0_f64, seed in 1..u64::MAX / 2) {
        let at = (length as f64 * at) as usize;
        let state = State::random(length, seed);
        for isa in Isa::available() {
            let mut parts = state.clone();
            let (p, m, v) = (&mut parts.param, &mut parts.exp_avg, &mut parts.exp_avg_sq);
            let (p, m, v) = (p.split_at_mut(at), m.split_at_mut(at), v.split_at_mut(at));
            let g = state.grad.split_at(at);
            adamw(isa, &third_step(), p.0, g.0, m.0, v.0).unwrap();
            adamw(isa, &third_step(), p.1, g.1, m.1, v.1).unwrap();
            prop_assert_eq!(parts.bits(), state.stepped(isa, &third_step()).bits());
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn a_split_of_many_chunks_gives_the_same_bits(at in 0..=3 * CHUNK_ELEMENTS, seed in 1..u64::MAX / 2) {
        let state = State::random(3 * CHUNK_ELEMENTS + 11, seed);
        let isa = Isa::detect();
        let mut parts = state.clone();
        let (p, m, v) = (&mut parts.param, &mut parts.exp_avg, &mut parts.exp_avg_sq);
        let (p, m, v) = (p.split_at_mut(at), m.split_at_mut(at), v.split_at_mut(at));
        let g = state.grad.split_at(at);
        adamw(isa, &third_step(), p.0, g.0, m.0, v.0).unwrap();
        adamw(isa, &third_step(), p.1, g.1, m.1, v.1).unwrap();
        prop_assert!(parts.bits() == state.stepped(isa, &third_step()).bits());
    }
}
