//! Laws of a layout, whatever the recipe.

use std::path::Path;

use overspill_optim::{MomentFormat, WeightFormat};

use super::*;
use crate::optimizer::Optimizer;

#[test]
fn whatever_the_recipe_tiles_are_disk_blocks_and_blocks_of_moments_have_one_parameter() {
    let text = r#"{"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 40}"#;
    let config = ModelConfig::from_json(text, Path::new("config.json")).unwrap();
    let recipes = [
        (WeightFormat::F32, MomentFormat::F32, 16),
        (WeightFormat::F32, MomentFormat::Blocks8, 256),
        (WeightFormat::Bf16WithRemainder, MomentFormat::Bf16, 16),
        (WeightFormat::Bf16Stochastic, MomentFormat::Blocks8, 256),
    ];
    for (weights, moments, alignment) in recipes {
        let layout = ModelLayout::of(&config, Optimizer::default().recipe(weights, moments).unwrap());
        let mut number = 0;
        for unit in layout.units() {
            assert!(layout.weights_bytes(unit).is_multiple_of(BLOCK_ALIGNMENT));
            assert!(layout.record_bytes(unit.padded).is_multiple_of(BLOCK_ALIGNMENT));
            let mut end = 0;
            for parameter in &unit.parameters {
                assert_eq!(parameter.range.start, usize::next_multiple_of(end, alignment));
                assert_eq!(parameter.number, number);
                (end, number) = (parameter.range.end, number + 1);
            }
            assert!(end <= unit.padded);
        }
    }
    assert_eq!(ModelLayout::new(&config).state_recipe(), &single_precision_adamw().into());
}

/// The runs of a model of one layer, by unit: the parameters that are whole, and how many runs there are.
fn wholes(layout: &ModelLayout) -> Vec<(Vec<&str>, usize)> {
    layout
        .units()
        .iter()
        .map(|unit| {
            let names = unit.runs.iter().filter_map(|run| match run.rule {
                PieceRule::Elements(_) => None,
                PieceRule::Whole { parameter, .. } => Some(&unit.parameters[parameter]),
            });
            let names = names.map(|parameter| parameter.name.trim_end_matches(".weight"));
            let names = names.map(|name| name.rsplit('.').next().unwrap_or_default());
            (names.collect(), unit.runs.len())
        })
        .collect()
}

#[test]
fn pieces_have_every_element_once_and_a_whole_parameter_is_one() {
    let text = r#"{"vocab_size": 300, "hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 2000}"#;
    let config = ModelConfig::from_json(text, Path::new("config.json")).unwrap();
    let matrices = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];
    let mut all = vec!["input_layernorm", "post_attention_layernorm"];
    all.splice(1..1, matrices[..4].iter().copied());
    all.extend(&matrices[4..]);
    for weights in [WeightFormat::F32, WeightFormat::F16WithMaster] {
        let muon = ModelLayout::of(&config, StateRecipe::Muon(weights));
        assert_eq!(wholes(&muon), [(vec![], 1), (matrices.to_vec(), 9), (vec![], 1)]);
        let adafactor = ModelLayout::of(&config, StateRecipe::Adafactor(weights));
        let head = vec!["norm", "lm_head"];
        assert_eq!(wholes(&adafactor), [(vec!["embed_tokens"], 1), (all.clone(), 9), (head, 2)]);
        for layout in [muon, adafactor] {
            for tile_elements in [2048, 1 << 14, usize::MAX] {
                let mut longest = (0, 0);
                for unit in layout.units() {
                    let pieces: Vec<_> = unit.pieces(tile_elements).collect();
                    assert_eq!(pieces.len(), unit.piece_count(tile_elements));
                    let mut next = 0;
                    let mut records = 0;
                    for piece in &pieces {
                        assert_eq!(piece.range.start, next);
                        assert!((piece.elements() * layout.weight_bytes()).is_multiple_of(BLOCK_ALIGNMENT));
                        assert!(piece.record().bytes() <= piece.record_bytes());
                        assert!(piece.record_bytes().is_multiple_of(BLOCK_ALIGNMENT));
                        if let PieceRule::Whole { recipe, parameter } = piece.rule {
                            let parameter = &unit.parameters[parameter];
                            assert_eq!(parameter.range, next..next + recipe.elements());
                            assert!(parameter.range.end <= piece.range.end);
                            assert!(recipe.workspace_bytes() <= layout.update_workspace_bytes());
                        } else {
                            assert!(piece.elements() <= tile_elements);
                        }
                        next = piece.range.end;
                        records += piece.record_bytes();
                        longest = (longest.0.max(piece.elements()), longest.1.max(piece.record_bytes()));
                    }
                    assert_eq!((next, records), (unit.padded, layout.records_bytes(unit, tile_elements)));
                }
                let said = (layout.longest_piece(tile_elements), layout.longest_record_bytes(tile_elements));
                assert_eq!(said, longest);
            }
        }
    }
}
