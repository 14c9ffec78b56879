//! Rules that need whole parameters: the same bits on every path, spoiled gradients, and calls that are refused.

use overspill_optim::{
    AdafactorConfig, AdafactorStep, ApplyError, Gradient, Isa, MuonConfig, MuonStep, Origin, Outcome,
    RecipeError, Shape, WeightFormat, Weights, WholeRecipe, WholeRule, WholeStep,
};

use crate::{bits, noise, on_threads};

const STEPS: [(WholeRule, fn() -> WholeStep); 2] = [
    (WholeRule::Adafactor, || {
        WholeStep::Adafactor(AdafactorStep::new(&AdafactorConfig::default(), 1e-2, 0.1, 3, 0.5))
    }),
    (WholeRule::Muon, || WholeStep::Muon(MuonStep::new(&MuonConfig::default(), 1e-2, 0.1, 0.5))),
];

fn shapes(rule: WholeRule) -> Vec<Shape> {
    let matrices = [Shape::matrix(1, 1), Shape::matrix(70, 33), Shape::matrix(33, 300)];
    let others = [Shape::Vector(5000), Shape::Matrices { count: 3, rows: 5, columns: 40 }];
    matrices.into_iter().chain(others.into_iter().filter(|_| rule == WholeRule::Adafactor)).collect()
}

/// What a parameter is after three steps.
#[derive(PartialEq)]
struct Stepped {
    single: Vec<u32>,
    half: Vec<u16>,
    record: Vec<u64>,
}

fn stepped(isa: Isa, rule: WholeRule, format: WeightFormat, shape: Shape, step: &WholeStep) -> Stepped {
    let recipe = WholeRecipe::new(rule, format, shape).unwrap();
    let elements = recipe.elements();
    let mut record = vec![0; recipe.layout().unwrap().bytes() / 8];
    let (mut single, mut half) = (vec![0.0; elements], vec![0; elements]);
    for number in 0..4 {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
        let origin = Origin { seed: 1, step: number, ..Origin::default() };
        let values = noise(elements, number + 1);
        let gradient = Gradient::F32(&values);
        let weights = match format {
            WeightFormat::F32 => Weights::F32(&mut single),
            WeightFormat::F16WithMaster => Weights::F16(&mut half),
            WeightFormat::Bf16WithRemainder | WeightFormat::Bf16Stochastic => Weights::Bf16(&mut half),
        };
        let outcome = if number == 0 {
            recipe.initialize(isa, bytes, weights, gradient, origin)
        } else {
            recipe.apply(isa, step, bytes, weights, gradient, origin)
        };
        assert_eq!(outcome, Ok(Outcome::Updated));
    }
    Stepped { single: bits(&single), half, record }
}

#[test]
fn whole_parameters_get_the_same_bits_on_every_instruction_set_and_any_number_of_threads() {
    use WeightFormat::{Bf16Stochastic, Bf16WithRemainder, F16WithMaster, F32};
    for (rule, step) in STEPS {
        for shape in shapes(rule) {
            for format in [F32, Bf16WithRemainder, F16WithMaster, Bf16Stochastic] {
                let scalar = on_threads(1, || stepped(Isa::Scalar, rule, format, shape, &step()));
                for isa in Isa::available() {
                    let shared = on_threads(5, || stepped(isa, rule, format, shape, &step()));
                    assert!(shared == scalar, "{isa} {rule:?} {format:?} {shape:?}");
                }
            }
        }
    }
}

#[test]
fn the_masters_of_a_whole_parameter_are_what_it_began_with() {
    use WeightFormat::{Bf16Stochastic, Bf16WithRemainder, F16WithMaster, F32};
    let values = noise(600, 1);
    for (rule, _) in STEPS {
        for format in [F32, Bf16WithRemainder, F16WithMaster, Bf16Stochastic] {
            let recipe = WholeRecipe::new(rule, format, Shape::matrix(20, 30)).unwrap();
            let mut record = vec![0_u64; recipe.layout().unwrap().bytes() / 8];
            let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
            let (mut single, mut half) = (vec![0.0; 600], vec![0; 600]);
            let mut weights = match format {
                F32 => Weights::F32(&mut single),
                F16WithMaster => Weights::F16(&mut half),
                Bf16WithRemainder | Bf16Stochastic => Weights::Bf16(&mut half),
            };
            let (isa, origin) = (Isa::detect(), Origin::default());
            let values = Gradient::F32(&values);
            let outcome = recipe.initialize(isa, bytes, weights.reborrow(), values, origin);
            assert_eq!(outcome, Ok(Outcome::Updated));
            let mut masters = vec![0.0; 600];
            recipe.read_masters(bytes, weights.reborrow(), &mut masters).unwrap();
            let exact = bits(&masters) == bits(&noise(600, 1));
            assert_eq!(exact, format != Bf16Stochastic, "{rule:?} {format:?}");
            let error = recipe.read_masters(bytes, weights, &mut masters[1..]);
            assert_eq!(error.unwrap_err().to_string(), "gradient has length 599, expected 600");
        }
    }
}

#[test]
fn a_whole_parameter_with_a_gradient_that_is_not_finite_stays_as_it_is() {
    for (rule, step) in STEPS {
        let recipe = WholeRecipe::new(rule, WeightFormat::F32, Shape::matrix(20, 30)).unwrap();
        let mut record = vec![0_u64; recipe.layout().unwrap().bytes() / 8];
        let mut param = noise(600, 1);
        let mut grad = noise(600, 2);
        grad[599] = f32::NAN;
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
        let (weights, gradient) = (Weights::F32(&mut param), Gradient::F32(&grad));
        let outcome = recipe.apply(Isa::detect(), &step(), bytes, weights, gradient, Origin::default());
        assert_eq!(outcome, Ok(Outcome::NonFinite));
        assert!(bits(&param) == bits(&noise(600, 1)) && record.iter().all(|x| *x == 0));
    }
}

#[test]
fn what_adafactor_keeps_of_a_matrix_is_its_sides() {
    let recipe =
        WholeRecipe::new(WholeRule::Adafactor, WeightFormat::Bf16WithRemainder, Shape::matrix(128, 512))
            .unwrap();
    let layout = recipe.layout().unwrap();
    assert_eq!(layout.bytes(), 2 * 128 * 512 + 4 * (128 + 512));
    assert!(recipe.workspace_bytes() >= 2 * 4 * recipe.elements());
}

#[test]
fn shapes_and_steps_that_do_not_fit_are_refused() {
    let new = |rule, shape| WholeRecipe::new(rule, WeightFormat::F32, shape);
    let refused = |matrices, rows, columns| Err(RecipeError::Shape { matrices, rows, columns });
    assert_eq!(new(WholeRule::Muon, Shape::Vector(5)), refused(1, 1, 5));
    let batch = Shape::Matrices { count: 2, rows: 3, columns: 4 };
    assert_eq!(new(WholeRule::Muon, batch), refused(2, 3, 4));
    assert_eq!(new(WholeRule::Adafactor, Shape::matrix(0, 4)), refused(1, 0, 4));
    assert_eq!(new(WholeRule::Adafactor, Shape::matrix(usize::MAX, 4)), refused(1, usize::MAX, 4));

    let recipe = new(WholeRule::Muon, Shape::matrix(1, 2)).unwrap();
    let mut record = vec![0_u64; recipe.layout().unwrap().bytes() / 8];
    let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut record);
    let mut param = [1.0, 2.0];
    let error = recipe.apply(
        Isa::detect(),
        &STEPS[0].1(),
        bytes,
        Weights::F32(&mut param),
        Gradient::F32(&[1.0; 2]),
        Origin::default(),
    );
    assert_eq!(error, Err(ApplyError::WrongStep { step: "Adafactor", rule: "Muon" }));
    let error = recipe.apply(
        Isa::detect(),
        &STEPS[1].1(),
        bytes,
        Weights::F32(&mut param),
        Gradient::F32(&[1.0; 3]),
        Origin::default(),
    );
    assert_eq!(error.unwrap_err().to_string(), "gradient has length 3, expected 2");
    assert_eq!(param, [1.0, 2.0]);
}
