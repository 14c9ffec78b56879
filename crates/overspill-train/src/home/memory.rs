//! The reference: all training state in ordinary memory, one array per unit, no tiles, no store.

use std::collections::HashMap;
use std::mem;
use std::sync::Arc;

use bytes::Bytes;
use overspill_optim::Recipe;

use super::buffer::Buffer;
use super::io::IoReport;
use super::tile::widen;
use super::{GradientStart, Home, Left, Masters, SavedInput, Source, TileState, Update, Visit};
use crate::error::{TrainError, check_stop};
use crate::layout::{ModelLayout, Unit};

/// Keeps everything in memory.
#[derive(Debug)]
pub struct MemoryHome {
    layout: ModelLayout,
    units: Vec<UnitState>,
    inputs: HashMap<(usize, usize), Bytes>,
}

/// The arrays of one unit, `UnitLayout::padded` elements each; to the recipe they are one tile.
#[derive(Debug)]
struct UnitState {
    /// As they are stored.
    weights: Arc<Floats>,
    gradient: Vec<f32>,
    record: Floats,
}

/// Weights that tensors may share, or other bytes that are aligned as numbers are.
#[derive(Debug)]
struct Floats(Vec<f32>);

impl Floats {
    fn zeros(bytes: usize) -> Self {
        Self(vec![0.0; bytes.div_ceil(size_of::<f32>())])
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        bytemuck::cast_slice_mut(&mut self.0)
    }
}

/// A tensor's share of the weights.
struct Shared(Arc<Floats>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.0.0)
    }
}

impl UnitState {
    fn tile<'a>(&'a mut self, recipe: &'a Recipe) -> TileState<'a> {
        let weights = Arc::get_mut(&mut self.weights).expect("no tensor outlives its pass over the layer");
        TileState { recipe, weights: weights.bytes_mut(), record: self.record.bytes_mut() }
    }
}

impl MemoryHome {
    /// Makes room for a model and fills its weights.
    ///
    /// # Errors
    /// What `source` fails with.
    pub fn new(layout: &ModelLayout, source: &mut Source<'_>) -> Result<Self, TrainError> {
        let mut units = Vec::with_capacity(layout.units().len());
        for unit in layout.units() {
            let mut values = vec![0.0; unit.padded];
            source(unit, &mut values)?;
            let mut state = UnitState {
                weights: Arc::new(Floats::zeros(layout.weights_bytes(unit))),
                gradient: Vec::new(),
                record: Floats::zeros(layout.record_bytes(unit.padded)),
            };
            state.tile(layout.recipe()).initialize(unit, 0, &values);
            values.fill(0.0);
            state.gradient = values;
            units.push(state);
        }
        Ok(Self { layout: layout.clone(), units, inputs: HashMap::new() })
    }
}

impl Home for MemoryHome {
    fn announce(&mut self, _visits: Vec<Visit>) -> Result<(), TrainError> {
        Ok(())
    }

    fn weights(&mut self, unit: Unit) -> Result<Bytes, TrainError> {
        let stored = Shared(self.units[self.layout.index(unit)].weights.clone());
        if self.layout.lends_weights() {
            return Ok(Bytes::from_owner(stored));
        }
        let mut widened = vec![0.0; self.layout.unit(unit).padded];
        widen(self.layout.recipe().weights(), stored.as_ref(), &mut widened);
        Ok(Bytes::from_owner(Shared(Arc::new(Floats(widened)))))
    }

    fn gradient(&mut self, unit: Unit, start: GradientStart) -> Result<Buffer, TrainError> {
        let mut gradient = mem::take(&mut self.units[self.layout.index(unit)].gradient);
        if start == GradientStart::Zero {
            gradient.fill(0.0);
        }
        Ok(Buffer::Owned(gradient))
    }

    fn put_gradient(&mut self, unit: Unit, gradient: Buffer) -> Result<(), TrainError> {
        let Buffer::Owned(gradient) = gradient else { unreachable!("this home hands out no other buffers") };
        self.units[self.layout.index(unit)].gradient = gradient;
        Ok(())
    }

    fn save_input(&mut self, which: SavedInput, input: &[f32]) -> Result<(), TrainError> {
        let copy = Arc::new(Floats(input.to_vec()));
        self.inputs.insert((which.layer, which.micro), Bytes::from_owner(Shared(copy)));
        Ok(())
    }

    fn saved_input(&mut self, which: SavedInput) -> Result<Bytes, TrainError> {
        let input = self.inputs.remove(&(which.layer, which.micro));
        Ok(input.expect("an input is saved before it is asked for"))
    }

    fn update(&mut self, update: &Update<'_>) -> Result<(), TrainError> {
        let recipe = self.layout.recipe();
        for (unit, state) in self.layout.units().iter().zip(&mut self.units) {
            check_stop(update.stop)?;
            let gradient = mem::take(&mut state.gradient);
            state.tile(recipe).update(unit, 0, &gradient, update);
            state.gradient = gradient;
        }
        Ok(())
    }

    fn masters(&mut self, unit: Unit, each: &mut Masters<'_>) -> Result<(), TrainError> {
        let state = &mut self.units[self.layout.index(unit)];
        let mut values = vec![0.0; self.layout.unit(unit).padded];
        state.tile(self.layout.recipe()).masters(&mut values);
        each(0, &values)
    }

    fn settle(&mut self) -> Result<(), TrainError> {
        Ok(())
    }

    fn commit(&mut self, _step: u64) -> Result<(), TrainError> {
        Ok(())
    }

    fn left(&self) -> Option<Left> {
        None
    }

    fn io(&self) -> Option<IoReport> {
        None
    }
}
