//! One step at a time, from the same state: what our rules make of it and what PyTorch makes of it.
//!
//! The reference is `tests/parity/optim.py`; `./test` makes the virtual environment that it runs in. It runs PyTorch's
//! single-tensor implementations on the CPU.
//!
//! Our element-wise rules take the operations of that code in its order and fuse where it fuses, so that nothing but a
//! unit in the last place is allowed for a CPU on which PyTorch has no fused operations; where it has them, the numbers are
//! equal. Adafactor and Muon reduce: the reference does so in `f64`, too.

use std::path::{Path, PathBuf};
use std::process::Command;

use overspill_optim::{
    AdafactorConfig, AdafactorStep, AdagradConfig, AdagradStep, AdamStep, AdamWConfig, AdamWStep, Gradient,
    Isa, LearningRateAdjustment, LionConfig, LionStep, MomentFormat, MuonConfig, MuonStep, Origin, Outcome,
    Recipe, Rule, SgdConfig, SgdStep, Shape, Step, Tile, WeightFormat, Weights, WholeRecipe, WholeRule,
    WholeStep,
};
use serde_json::Value;

/// The tensors of one step by name, widened to `f64` (exactly).
#[derive(Default)]
struct Tensors(Vec<(String, Vec<f64>)>);

impl Tensors {
    fn get(&self, name: &str) -> Option<&[f64]> {
        self.0.iter().find(|(own, _)| own == name).map(|(_, values)| values.as_slice())
    }

    fn floats(&self, name: &str) -> Option<Vec<f32>> {
        Some(self.get(name)?.iter().map(|x| *x as f32).collect())
    }
}

struct Case {
    name: String,
    shape: Vec<usize>,
    options: Value,
    steps: Vec<Tensors>,
}

impl Case {
    fn number(&self, option: &str) -> f64 {
        self.options[option].as_f64().unwrap_or(0.0)
    }

    fn flag(&self, option: &str) -> bool {
        self.options[option].as_bool().unwrap_or(false)
    }

    /// Steps behind the first one may be much later ones.
    fn step_number(&self, index: usize) -> u64 {
        let late = if index > 0 { self.number("late") as u64 } else { 0 };
        index as u64 + 1 + late
    }

    fn beta(&self, index: usize) -> f64 {
        self.options["betas"][index].as_f64().unwrap()
    }
}

/// Runs the reference.
fn cases(seed: u32) -> Vec<Case> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python =
        std::env::var_os("OVERSPILL_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("optim-{}-{seed}.bin", std::process::id()));
    let output = Command::new(&python)
        .arg(root.join("tests/parity/optim.py"))
        .arg(&out)
        .arg(seed.to_string())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}; ./test installs torch there", python.display()));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let bytes = std::fs::read(&out).unwrap();
    std::fs::remove_file(&out).unwrap();
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Vec<Case> {
    let line = bytes.iter().position(|byte| *byte == b'\n').unwrap();
    let listed: Vec<Value> = serde_json::from_slice(&bytes[..line]).unwrap();
    let mut rest = &bytes[line + 1..];
    let sizes = |value: &Value| -> Vec<usize> { serde_json::from_value(value.clone()).unwrap() };
    let mut cases = Vec::new();
    for listed in listed {
        let shape = sizes(&listed["shape"]);
        let mut steps = Vec::new();
        for step in listed["steps"].as_array().unwrap() {
            let mut tensors = Tensors::default();
            for tensor in step.as_array().unwrap() {
                let name = tensor["name"].as_str().unwrap();
                let elements = match name.trim_start_matches("new ") {
                    "row_var" => shape.iter().product::<usize>() / shape[shape.len() - 1],
                    "col_var" => shape.iter().product::<usize>() / shape[shape.len() - 2],
                    _ => shape.iter().product(),
                };
                let single = tensor["type"] == "f32";
                let (raw, later) = rest.split_at(elements * if single { 4 } else { 8 });
                rest = later;
                let values = if single {
                    raw.as_chunks().0.iter().map(|x| f64::from(f32::from_le_bytes(*x))).collect()
                } else {
                    raw.as_chunks().0.iter().map(|x| f64::from_le_bytes(*x)).collect()
                };
                tensors.0.push((name.to_owned(), values));
            }
            steps.push(tensors);
        }
        let name = listed["name"].as_str().unwrap().to_owned();
        cases.push(Case { name, shape, options: listed["options"].clone(), steps });
    }
    assert!(rest.is_empty());
    cases
}

/// The rule of an element-wise case, and the coefficients of its step number `number`.
fn rule(case: &Case, number: u64) -> Option<(Rule, Step)> {
    let (lr, weight_decay) = (case.number("lr"), case.number("weight_decay"));
    let adam = || AdamWConfig { beta1: case.beta(0), beta2: case.beta(1), eps: case.number("eps") };
    let amsgrad = case.flag("amsgrad");
    let sgd = SgdConfig {
        momentum: case.number("momentum"),
        dampening: case.number("dampening"),
        nesterov: case.flag("nesterov"),
    };
    let adagrad = AdagradConfig { lr_decay: case.number("lr_decay"), eps: case.number("eps") };
    Some(match case.name.split('_').next().unwrap() {
        "adamw" => {
            (Rule::AdamW { amsgrad }, Step::AdamW(AdamWStep::new(&adam(), lr, weight_decay, number, 1.0)))
        }
        "adam" => (Rule::Adam { amsgrad }, Step::Adam(AdamStep::new(&adam(), lr, weight_decay, number, 1.0))),
        "sgd" => (
            Rule::Sgd { momentum: sgd.momentum != 0.0 },
            Step::Sgd(SgdStep::new(&sgd, lr, weight_decay, number, 1.0)),
        ),
        "adagrad" => (
            Rule::Adagrad { initial_accumulator: case.number("initial_accumulator_value") as f32 },
            Step::Adagrad(AdagradStep::new(&adagrad, lr, weight_decay, number, 1.0)),
        ),
        "lion" => {
            let config = LionConfig { beta1: case.beta(0), beta2: case.beta(1) };
            (Rule::Lion, Step::Lion(LionStep::new(&config, lr, weight_decay, 1.0)))
        }
        _ => return None,
    })
}

/// How many `f32` are between `a` and `b`, and one; zeros of both signs are the same.
fn units_apart(a: f32, b: f32) -> u32 {
    let place = |x: f32| {
        let magnitude = (x.to_bits() & 0x7fff_ffff).cast_signed();
        if x.is_sign_negative() { -magnitude } else { magnitude }
    };
    assert!(!a.is_nan() && !b.is_nan());
    place(a).abs_diff(place(b))
}

/// The spacing of `f32` at `x`.
fn unit(x: f64) -> f64 {
    let x = (x.abs() as f32).max(f32::MIN_POSITIVE);
    f64::from(f32::from_bits(x.to_bits() + 1)) - f64::from(x)
}

#[test]
fn element_wise_rules_match_pytorch_to_one_unit_in_the_last_place() {
    let (mut compared, mut different) = (0, 0);
    for case in cases(11) {
        for (index, step) in case.steps.iter().enumerate() {
            let Some((rule, coefficients)) = rule(&case, case.step_number(index)) else { continue };
            let recipe = Recipe::new(rule, WeightFormat::F32, MomentFormat::F32).unwrap();
            let elements = case.shape[0];
            let layout = recipe.layout(elements).unwrap();
            let (mut param, grad) = (step.floats("param").unwrap(), step.floats("grad").unwrap());
            let mut record: Vec<f32> = vec![0.0; layout.bytes() / 4];
            let record: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
            let isa = Isa::detect();
            let values = param.clone();
            let tile = Tile { record, elements, range: 0..elements, weights: Weights::F32(&mut param) };
            let outcome = recipe.initialize(isa, tile, Gradient::F32(&values), Origin::default()).unwrap();
            assert_eq!(outcome, Outcome::Updated);
            for field in layout.fields() {
                // The first step of torch makes its state; ours has made it.
                if let Some(moment) = step.floats(field.name) {
                    record[field.bytes()].copy_from_slice(bytemuck::cast_slice(&moment));
                }
            }
            let tile = Tile { record, elements, range: 0..elements, weights: Weights::F32(&mut param) };
            let outcome =
                recipe.apply(isa, &coefficients, tile, Gradient::F32(&grad), Origin::default()).unwrap();
            assert_eq!(outcome, Outcome::Updated);

            let mut compare = |name: &str, new: &[f32]| {
                let expected = step.floats(&format!("new {name}")).unwrap();
                for i in 0..elements {
                    assert!(
                        units_apart(new[i], expected[i]) <= 1,
                        "{} step {index} {name}[{i}]: {:e} instead of {:e}, gradient {:e}",
                        case.name,
                        new[i],
                        expected[i],
                        grad[i]
                    );
                    different += u32::from(new[i] != expected[i]);
                    compared += 1;
                }
            };
            compare("param", &param);
            for field in layout.fields() {
                compare(field.name, bytemuck::cast_slice(&record[field.bytes()]));
            }
        }
    }
    assert!(compared > 90_000, "{compared}");
    println!("{different} of {compared} numbers differ from PyTorch's");
}

/// The record and weights of a parameter whose state is that before `step`.
fn whole_state(case: &Case, recipe: &WholeRecipe, step: &Tensors) -> (Vec<f32>, Vec<f32>) {
    let layout = recipe.layout().unwrap();
    let (values, origin) = (step.floats("param").unwrap(), Origin::default());
    let mut param = vec![0.0; values.len()];
    let mut record: Vec<f32> = vec![f32::NAN; layout.bytes() / 4];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
    let weights = Weights::F32(&mut param);
    let outcome = recipe.initialize(Isa::detect(), bytes, weights, Gradient::F32(&values), origin);
    assert_eq!(outcome, Ok(Outcome::Updated), "{}", case.name);
    for field in layout.fields() {
        if let Some(moment) = step.floats(field.name) {
            bytes[field.bytes()].copy_from_slice(bytemuck::cast_slice(&moment));
        }
    }
    (param, record)
}

fn whole_shape(case: &Case) -> Shape {
    match case.shape[..] {
        [elements] => Shape::Vector(elements),
        [rows, columns] => Shape::matrix(rows, columns),
        [count, rows, columns] => Shape::Matrices { count, rows, columns },
        _ => unreachable!("the reference has no such case"),
    }
}

#[test]
fn adafactor_is_the_rounded_exact_step_and_close_to_pytorch_in_single_precision() {
    let config = AdafactorConfig::default();
    let mut compared = 0;
    for case in cases(12).iter().filter(|case| case.name.starts_with("adafactor")) {
        let recipe = WholeRecipe::new(WholeRule::Adafactor, WeightFormat::F32, whole_shape(case)).unwrap();
        for (index, step) in case.steps.iter().enumerate() {
            let coefficients = AdafactorStep::new(
                &config,
                case.number("lr"),
                case.number("weight_decay"),
                index as u64 + 1,
                1.0,
            );
            let (mut param, mut record) = whole_state(case, &recipe, step);
            let before = param.clone();
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
            let grad = step.floats("grad").unwrap();
            let (weights, gradient) = (Weights::F32(&mut param), Gradient::F32(&grad));
            let coefficients = WholeStep::Adafactor(coefficients);
            let outcome = recipe
                .apply(Isa::detect(), &coefficients, bytes, weights, gradient, Origin::default())
                .unwrap();
            assert_eq!(outcome, Outcome::Updated);
            let mut compare = |name: &str, new: &[f32]| {
                let expected = step.get(&format!("new {name}")).unwrap();
                for (i, (new, expected)) in new.iter().zip(expected).enumerate() {
                    // Where the old parameter and the change cancel, a unit of the rest says nothing: both were rounded
                    // at the last place of the larger of them, and the change is at most as large as old and new together.
                    let together =
                        if name == "param" { expected.abs() + f64::from(before[i].abs()) } else { *expected };
                    let off = (f64::from(*new) - expected).abs();
                    let allowed = if case.name.ends_with("_f64") {
                        unit(together)
                    } else {
                        4e-6 * together.abs().max(1e-2)
                    };
                    let right = off <= allowed;
                    assert!(right, "{} step {index} {name}[{i}]: {new:e} instead of {expected:e}", case.name);
                    compared += 1;
                }
            };
            compare("param", &param);
            for field in recipe.layout().unwrap().fields() {
                compare(
                    field.name,
                    bytemuck::cast_slice(&bytemuck::cast_slice::<f32, u8>(&record)[field.bytes()]),
                );
            }
        }
    }
    assert!(compared > 30_000, "{compared}");
}

#[test]
fn muon_is_the_exact_iteration_up_to_rounding_and_pytorch_up_to_the_rounding_of_bf16() {
    let mut compared = 0;
    for case in cases(13).iter().filter(|case| case.name.starts_with("muon")) {
        let recipe = WholeRecipe::new(WholeRule::Muon, WeightFormat::F32, whole_shape(case)).unwrap();
        let adjustment = match case.options["adjust_lr_fn"].as_str() {
            Some("match_rms_adamw") => LearningRateAdjustment::MatchRmsAdamW,
            _ => LearningRateAdjustment::Original,
        };
        let nesterov = case.flag("nesterov");
        let config =
            MuonConfig { momentum: case.number("momentum"), nesterov, adjustment, ..MuonConfig::default() };
        let (lr, weight_decay) = (case.number("lr"), case.number("weight_decay"));
        let exact = case.name.ends_with("_f64");
        for (index, step) in case.steps.iter().enumerate() {
            let (mut param, mut record) = whole_state(case, &recipe, step);
            let before = param.clone();
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
            let grad = step.floats("grad").unwrap();
            let (weights, gradient) = (Weights::F32(&mut param), Gradient::F32(&grad));
            let coefficients = WholeStep::Muon(MuonStep::new(&config, lr, weight_decay, 1.0));
            let outcome = recipe
                .apply(Isa::detect(), &coefficients, bytes, weights, gradient, Origin::default())
                .unwrap();
            assert_eq!(outcome, Outcome::Updated);

            let momentum = step.get("new momentum_buffer").unwrap();
            for ((ours, expected), grad) in record.iter().zip(momentum).zip(&grad) {
                let off = (f64::from(*ours) - expected).abs();
                assert!(off <= unit(expected.abs().max(grad.abs().into())), "{}: off by {off:e}", case.name);
            }
            // The update alone, measured against its own size, which is a hundredth of the parameter's: a unit of the
            // parameter is 1e-5 of it.
            let decay = 1.0 - lr * weight_decay;
            let expected = step.get("new param").unwrap();
            let (mut off, mut size) = (0.0, 0.0);
            for i in 0..param.len() {
                let update = expected[i] - f64::from(before[i]) * decay;
                off += (f64::from(param[i]) - expected[i]).powi(2);
                size += update * update;
            }
            let relative = (off / size).sqrt();
            assert!(relative < if exact { 1e-4 } else { 3e-2 }, "{} step {index}: {relative:e}", case.name);
            compared += param.len();
        }
    }
    assert_eq!(compared, 4 * 4 * 32 * 80);
}
