//! The arithmetic is that of `transformers` and `torch`: logits of one batch, losses of ten AdamW steps.
//!
//! The reference is a Python script; `./test` makes the virtual environment that it runs in.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;

use overspill_io::BackendChoice;
use overspill_optim::{AdamWConfig, Isa};
use overspill_swap::Durability;
use overspill_train::checkpoint::{Checkpoint, CheckpointWriter, Precision};
use overspill_train::config::ModelConfig;
use overspill_train::data::Tokenizer;
use overspill_train::home::MemoryHome;
use overspill_train::layout::{ModelLayout, Unit};
use overspill_train::model::{BatchShape, Model, Weights};
use overspill_train::optimizer::Optimizer;
use overspill_train::plan::StepShape;
use overspill_train::schedule::Schedule;
use overspill_train::trainer::{BatchSource, Commit, Settings, Trainer};
use overspill_train::transfer::{ExportOptions, Form, ImportOptions, export, import};
use serde::Deserialize;

/// What `reference.py make` writes beside the model.
#[derive(Deserialize)]
struct Reference {
    batch: usize,
    seq: usize,
    accumulate: usize,
    learning_rate: f64,
    weight_decay: f64,
    betas: (f64, f64),
    clip: f64,
    /// By step, by micro-batch.
    ids: Vec<Vec<Vec<u32>>>,
    targets: Vec<Vec<Vec<u32>>>,
    logits: Vec<f64>,
    losses: Vec<f64>,
}

#[derive(Deserialize)]
struct Loaded {
    ids: Vec<u32>,
    logits: Vec<f64>,
}

fn reference(arguments: &[&str], folder: &Path, input: &str) -> Vec<u8> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let python =
        std::env::var_os("OVERSPILL_PYTHON").map_or_else(|| root.join(".venv/bin/python"), PathBuf::from);
    let mut child = Command::new(&python)
        .arg(root.join("tests/parity/reference.py"))
        .args(arguments)
        .arg(folder)
        .envs([("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_VERBOSITY", "error")])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| {
            panic!("{}: {e}; ./test installs torch and transformers there", python.display())
        });
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// A model that was read from a folder, all units in memory.
struct Opened {
    config: ModelConfig,
    layout: ModelLayout,
    units: Vec<Vec<f32>>,
}

impl Opened {
    fn read(folder: &Path) -> Self {
        let checkpoint = Checkpoint::open(folder).unwrap();
        let layout = ModelLayout::new(checkpoint.config());
        let read = |unit: &_| {
            let mut weights = vec![0.0; layout.unit(*unit).padded];
            checkpoint.read_unit(layout.unit(*unit), &mut weights).unwrap();
            weights
        };
        let units = layout.units().iter().map(|unit| read(&unit.unit)).collect();
        Self { config: checkpoint.config().clone(), layout, units }
    }

    fn weights(&self, unit: Unit) -> Weights<'_> {
        let index = self.layout.index(unit);
        Weights::new(self.layout.unit(unit), bytes::Bytes::from_owner(Floats(self.units[index].clone())))
    }

    fn logits(&self, batch: BatchShape, ids: &[u32]) -> Vec<f32> {
        let model = Model::new(&self.config, batch);
        let embedding = self.weights(Unit::Embedding);
        let mut flow = model.embed(&embedding, ids);
        for layer in 0..self.config.layers {
            flow = model.layer_forward(&self.weights(Unit::Layer(layer)), &flow);
        }
        model.logits(&self.weights(Unit::Head), self.config.tied.then_some(&embedding), &flow)
    }
}

struct Floats(Vec<f32>);

impl AsRef<[u8]> for Floats {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0)
    }
}

impl BatchSource for &Reference {
    fn fill(&self, step: u64, micro: usize, inputs: &mut Vec<u32>, targets: &mut Vec<u32>) {
        let step = step as usize - 1;
        inputs.clone_from(&self.ids[step][micro]);
        targets.clone_from(&self.targets[step][micro]);
    }
}

fn assert_close(ours: impl IntoIterator<Item = f64>, theirs: &[f64], tolerance: f64) {
    let scale = theirs.iter().fold(0.0_f64, |largest, value| largest.max(value.abs()));
    let mut count = 0;
    for (ours, &theirs) in ours.into_iter().zip(theirs) {
        assert!((ours - theirs).abs() <= tolerance * scale, "value {count}: {ours} and {theirs}");
        count += 1;
    }
    assert_eq!(count, theirs.len());
}

fn agrees_with_the_reference(arguments: &[&str]) {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path().join("model");
    reference(&[&["make"], arguments].concat(), &folder, "");
    let reference: Reference =
        serde_json::from_slice(&std::fs::read(folder.join("reference.json")).unwrap()).unwrap();
    let batch = BatchShape { batch: reference.batch, seq: reference.seq };

    let opened = Opened::read(&folder);
    let logits = opened.logits(batch, &reference.ids[0][0]);
    assert_close(logits.into_iter().map(f64::from), &reference.logits, 1e-4);

    let settings = Settings {
        shape: StepShape { batch, accumulate: reference.accumulate },
        schedule: Schedule { peak: reference.learning_rate, warmup: 0, steps: u64::MAX },
        weight_decay: reference.weight_decay,
        clip: Some(reference.clip),
        optimizer: Optimizer::AdamW(AdamWConfig {
            beta1: reference.betas.0,
            beta2: reference.betas.1,
            eps: 1e-8,
        }),
        loss_scaler: None,
        seed: 0,
        isa: Isa::detect(),
        commit: Commit::OnDemand,
    };
    let mut units = opened.units.iter();
    let home = MemoryHome::new(&opened.layout, &mut |_, weights| {
        weights.copy_from_slice(units.next().unwrap());
        Ok(())
    })
    .unwrap();
    let mut trainer = Trainer::new(&opened.config, &opened.layout, settings, home, &reference);
    let losses: Vec<_> =
        reference.losses.iter().map(|_| trainer.step(&AtomicBool::new(false)).unwrap().loss).collect();
    for (ours, theirs) in losses.iter().zip(&reference.losses) {
        assert!((ours - theirs).abs() <= 1e-3 * theirs, "{losses:?} and {:?}", reference.losses);
    }
    assert!(losses[9] < 0.9 * losses[0], "ten steps learned something: {losses:?}");
}

#[test]
fn logits_and_ten_adamw_steps_of_an_untied_llama_equal_those_of_transformers() {
    agrees_with_the_reference(&[]);
}

#[test]
fn logits_and_ten_adamw_steps_of_a_tied_llama_equal_those_of_transformers() {
    agrees_with_the_reference(&["--tied", "--llama3"]);
}

#[test]
fn transformers_loads_what_is_written_and_computes_the_same_logits() {
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let folder = folder.path().join("out");
    let text = r#"{"vocab_size": 256, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.2}"#;
    let config = ModelConfig::from_json(text, Path::new("config.json")).unwrap();
    let layout = ModelLayout::new(&config);
    let first = overspill_train::Initializer::new(&config, &layout, 5);
    let mut writer = CheckpointWriter::create(&folder, &config, &layout, &Tokenizer::Bytes).unwrap();
    for unit in layout.units() {
        let mut weights = vec![0.0; unit.padded];
        first.fill(unit, &mut weights);
        writer.write_unit(unit, &weights).unwrap();
    }
    writer.finish().unwrap();

    let text = "héllo, wörld";
    let loaded: Loaded = serde_json::from_slice(&reference(&["load"], &folder, text)).unwrap();
    assert_eq!(loaded.ids, text.bytes().map(u32::from).collect::<Vec<_>>());
    let opened = Opened::read(&folder);
    let logits = opened.logits(BatchShape { batch: 1, seq: loaded.ids.len() }, &loaded.ids);
    assert_close(logits.into_iter().map(f64::from), &loaded.logits, 1e-4);
}

#[test]
fn transformers_loads_weights_that_were_exported_from_a_store() {
    let root = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let made = root.path().join("made");
    reference(&["make"], &made, "");
    let swap = root.path().join("swap");
    std::fs::create_dir(&swap).unwrap();
    let running = AtomicBool::new(false);
    let imported = ImportOptions {
        from: made.clone(),
        directories: vec![swap.clone()],
        durability: Durability::None,
        backend: BackendChoice::Auto,
    };
    import(&imported, &running, &mut |_| {}, &mut |_, _| {}).unwrap();
    let theirs = |folder: &Path| -> Loaded {
        serde_json::from_slice(&reference(&["load"], folder, "hello world")).unwrap()
    };
    let made = theirs(&made);
    for (precision, tolerance) in [(Precision::F32, 1e-6), (Precision::Bf16, 5e-2)] {
        let out = root.path().join(precision.name());
        let form = Form::Weights(precision);
        let options = ExportOptions { form, ..ExportOptions::new(swap.clone(), out.clone()) };
        export(&options, &running, &mut |_, _| {}).unwrap();
        let loaded = theirs(&out);
        assert_eq!(loaded.ids, made.ids, "the tokenizer came along");
        assert_close(loaded.logits, &made.logits, tolerance);
    }
}
