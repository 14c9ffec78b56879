//! Rules that need whole parameters, in training: the same bits wherever the state lives, and memory that is planned for.

use overspill_optim::{
    AdafactorConfig, AdamWConfig, LearningRateAdjustment, MomentFormat, MuonConfig, WeightFormat,
};
use overspill_train::Initializer;
use overspill_train::home::MemoryHome;
use overspill_train::layout::{ModelLayout, Unit};
use overspill_train::model::{BatchShape, Model};
use overspill_train::optimizer::{Optimizer, single_precision_adamw};
use overspill_train::piece::PieceRule;
use overspill_train::plan::{Fixed, MemoryPlan, StepShape};

use crate::case::{Case, RUNNING, drawn, equals_in_memory, is_resumed};

const WEIGHTS: [WeightFormat; 4] = [
    WeightFormat::F32,
    WeightFormat::Bf16WithRemainder,
    WeightFormat::Bf16Stochastic,
    WeightFormat::F16WithMaster,
];

fn optimizers() -> [Optimizer; 2] {
    let muon = MuonConfig { adjustment: LearningRateAdjustment::MatchRmsAdamW, ..MuonConfig::default() };
    let adamw = AdamWConfig::default();
    [Optimizer::Adafactor(AdafactorConfig::default()), Optimizer::Muon { muon, adamw }]
}

/// Both rules, with weights in every format.
fn cases(case: fn(u64) -> Case) -> impl Iterator<Item = Case> {
    let recipes = optimizers().into_iter().flat_map(|rule| WEIGHTS.map(|weights| (rule, weights)));
    recipes.map(move |(rule, weights)| case(7).with(rule, weights, MomentFormat::F32))
}

#[test]
fn whole_parameters_train_to_the_same_bits_on_storage_and_in_memory() {
    for case in cases(Case::tied).chain(cases(Case::untied)) {
        equals_in_memory(&case);
    }
}

#[test]
fn a_resumed_run_of_whole_parameters_has_the_bits_of_one_that_was_never_interrupted() {
    let cases = cases(Case::tied).zip(cases(Case::untied)).enumerate();
    cases.for_each(|(i, (tied, untied))| is_resumed(if i.is_multiple_of(2) { &tied } else { &untied }));
}

#[test]
fn muon_has_the_matrices_of_the_layers_and_adamw_the_rest() {
    let [_, muon] = optimizers();
    // One step of AdamW alone, and of Muon with it: the first losses and gradients are the same.
    let first_step = |optimizer| {
        let case = Case::untied(7).with(optimizer, WeightFormat::F32, MomentFormat::F32);
        let first = Initializer::new(&case.config, &case.layout, case.seed);
        let home = MemoryHome::new(&case.layout, &mut drawn(&first)).unwrap();
        let mut trainer = case.trainer(home);
        trainer.step(&RUNNING).unwrap();
        let mut parameters = Vec::new();
        let masters = trainer.masters(|unit, _, values| {
            parameters.extend(unit.parameters.iter().map(|parameter| {
                let values: Vec<u32> = values[parameter.range.clone()].iter().map(|x| x.to_bits()).collect();
                (unit.unit, parameter.shape.len(), values)
            }));
            Ok(())
        });
        masters.unwrap();
        parameters
    };
    let adamw = first_step(Optimizer::default());
    for (with_muon, adamw) in first_step(muon).into_iter().zip(adamw) {
        let (unit, dimensions, _) = with_muon;
        let is_muons = matches!(unit, Unit::Layer(_)) && dimensions == 2;
        assert_eq!(with_muon != adamw, is_muons, "{unit} {dimensions}");
    }
}

#[test]
fn the_plan_has_room_for_the_longest_parameter_and_what_its_update_takes() {
    let text = r#"{"vocab_size": 9000, "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "intermediate_size": 4096}"#;
    for optimizer in optimizers() {
        let shape = StepShape { batch: BatchShape { batch: 1, seq: 4 }, accumulate: 1 };
        let case = Case::new(text, shape, 1).with(optimizer, WeightFormat::F32, MomentFormat::F32);
        let fixed = Fixed::depth(Some(0));
        let of = |layout: &ModelLayout| {
            let refused = MemoryPlan::new(&case.config, layout, case.shape, fixed, 0, 0).unwrap_err();
            let plan = MemoryPlan::new(&case.config, layout, case.shape, fixed, 0, refused.least).unwrap();
            let less = MemoryPlan::new(&case.config, layout, case.shape, fixed, 0, refused.least - 1);
            assert_eq!(less.unwrap_err().least, refused.least, "it is the least");
            (plan, refused)
        };
        let (plan, refused) = of(&case.layout);
        let of_model = Model::workspace_bytes(&case.config, case.shape.batch);
        assert!(case.layout.update_workspace_bytes() > 2 * of_model, "it is the update that counts");
        let mut wholes = 0;
        for piece in case.layout.units().iter().flat_map(|unit| unit.pieces(plan.tile_elements())) {
            if let PieceRule::Whole { recipe, .. } = piece.rule {
                wholes += 1;
                assert!(plan.piece_gradient_bytes() >= 4 * recipe.elements());
                assert!(refused.computation >= recipe.workspace_bytes());
            }
            assert!(plan.piece_weights_bytes(&case.layout) >= 4 * piece.elements());
            assert!(plan.record_bytes() >= piece.record_bytes());
        }
        assert!(wholes > 0);
        let adamw = ModelLayout::of(&case.config, single_precision_adamw());
        assert!(case.layout.update_workspace_bytes() > 0);
        assert_eq!(adamw.update_workspace_bytes(), 0);
    }
}
