//! Single fields of a record in single precision, for whoever shows state to other programs or takes it from them.
//!
//! What is read is what the rule would work with; what is written is rounded to the nearest that the format has.

use crate::error::ApplyError;
use crate::format::blocks::{self, Code};
use crate::format::moment::{BLOCK_ELEMENTS, Bf16Moments, MomentCells, MomentFormat};
use crate::recipe::Recipe;
use crate::record::{Field, RecordLayout};
use crate::whole::WholeRecipe;

/// Random bits that round to the nearest.
const NEAREST: u32 = 1 << 31;

impl Recipe {
    /// Writes the moment `name` of a tile of `elements` elements to `out`, one number for each.
    ///
    /// # Errors
    ///
    /// [`ApplyError::NoField`], [`ApplyError::Length`], [`ApplyError::TooLarge`]; nothing was written.
    pub fn read_moment(
        &self,
        record: &[u8],
        elements: usize,
        name: &str,
        out: &mut [f32],
    ) -> Result<(), ApplyError> {
        let (layout, field, moment) = self.moment(record.len(), elements, name)?;
        ApplyError::check("out", out.len(), elements)?;
        let cells = &record[field.bytes()];
        match self.moments() {
            MomentFormat::F32 => widen(cells, out, f32::from_ne_bytes),
            MomentFormat::Bf16 => widen(cells, out, |cell| Bf16Moments::load(u16::from_ne_bytes(cell))),
            MomentFormat::Blocks8 => {
                let code = Code::of(self.rule().signed(moment));
                let scales = &record[self.scales(&layout, moment).bytes()];
                let blocks = cells.chunks(BLOCK_ELEMENTS).zip(out.chunks_mut(BLOCK_ELEMENTS));
                for ((cells, out), scale) in blocks.zip(scales.as_chunks().0) {
                    let scale = f32::from_ne_bytes(*scale);
                    out.iter_mut().zip(cells).for_each(|(out, cell)| *out = code.decode(*cell, scale));
                }
            }
        }
        Ok(())
    }

    /// Sets the moment `name` of a tile of as many elements as there are `values`.
    ///
    /// # Errors
    ///
    /// As [`Recipe::read_moment`]; nothing was written.
    pub fn write_moment(&self, record: &mut [u8], name: &str, values: &[f32]) -> Result<(), ApplyError> {
        let (layout, field, moment) = self.moment(record.len(), values.len(), name)?;
        match self.moments() {
            MomentFormat::F32 => narrow(values, &mut record[field.bytes()], f32::to_ne_bytes),
            MomentFormat::Bf16 => {
                let store = |x| Bf16Moments::store(x, || NEAREST).to_ne_bytes();
                narrow(values, &mut record[field.bytes()], store);
            }
            MomentFormat::Blocks8 => {
                let code = Code::of(self.rule().signed(moment));
                let scale_of = self.scales(&layout, moment);
                for (at, values) in values.chunks(BLOCK_ELEMENTS).enumerate() {
                    let mut block = [0.0; BLOCK_ELEMENTS];
                    block[..values.len()].copy_from_slice(values);
                    let scale = blocks::scale(&block);
                    let start = scale_of.start + at * scale_of.cell_bytes;
                    record[start..start + scale_of.cell_bytes].copy_from_slice(&scale.to_ne_bytes());
                    let start = field.start + at * BLOCK_ELEMENTS;
                    let cells = record[start..start + values.len()].iter_mut();
                    cells.zip(values).for_each(|(cell, x)| *cell = code.encode(*x, scale, NEAREST));
                }
            }
        }
        Ok(())
    }

    /// The names of the moments, as PyTorch calls them.
    pub fn moment_names(&self) -> impl Iterator<Item = &'static str> {
        self.rule().moments().iter().map(|(name, _)| *name)
    }

    fn moment(
        &self,
        record_bytes: usize,
        elements: usize,
        name: &str,
    ) -> Result<(RecordLayout, Field, usize), ApplyError> {
        let layout = self.layout(elements)?;
        ApplyError::check("record", record_bytes, layout.bytes())?;
        let moment = self.moment_names().position(|known| known == name).ok_or(ApplyError::NoField)?;
        let field = *layout.field(name).ok_or(ApplyError::NoField)?;
        Ok((layout, field, moment))
    }

    fn scales(&self, layout: &RecordLayout, moment: usize) -> Field {
        let (_, name) = self.rule().moments()[moment];
        *layout.field(name).expect("a layout in blocks has a scale for every moment")
    }
}

impl WholeRecipe {
    /// Writes the field `name` of the record to `out`, one number for each of its cells.
    ///
    /// # Errors
    ///
    /// As [`Recipe::read_moment`]; nothing was written.
    pub fn read_moment(&self, record: &[u8], name: &str, out: &mut [f32]) -> Result<(), ApplyError> {
        let field = self.moment(record.len(), name)?;
        ApplyError::check("out", out.len(), field.cells)?;
        widen(&record[field.bytes()], out, f32::from_ne_bytes);
        Ok(())
    }

    /// Sets the field `name` of the record, one number for each of its cells.
    ///
    /// # Errors
    ///
    /// As [`Recipe::read_moment`]; nothing was written.
    pub fn write_moment(&self, record: &mut [u8], name: &str, values: &[f32]) -> Result<(), ApplyError> {
        let field = self.moment(record.len(), name)?;
        ApplyError::check("values", values.len(), field.cells)?;
        narrow(values, &mut record[field.bytes()], f32::to_ne_bytes);
        Ok(())
    }

    /// The names of the fields that are not the weight's, as PyTorch calls them, and their numbers of cells.
    ///
    /// # Errors
    ///
    /// [`ApplyError::TooLarge`] when the record's bytes cannot be counted.
    pub fn moment_names(&self) -> Result<Vec<(&'static str, usize)>, ApplyError> {
        let layout = self.layout()?;
        let moments = &layout.fields()[self.weight_fields()..];
        Ok(moments.iter().map(|field| (field.name, field.cells)).collect())
    }

    fn moment(&self, record_bytes: usize, name: &str) -> Result<Field, ApplyError> {
        let layout = self.layout()?;
        ApplyError::check("record", record_bytes, layout.bytes())?;
        let mut moments = layout.fields()[self.weight_fields()..].iter();
        moments.find(|field| field.name == name).copied().ok_or(ApplyError::NoField)
    }
}

fn widen<const N: usize>(cells: &[u8], out: &mut [f32], load: impl Fn([u8; N]) -> f32) {
    out.iter_mut().zip(cells.as_chunks().0).for_each(|(out, cell)| *out = load(*cell));
}

fn narrow<const N: usize>(values: &[f32], cells: &mut [u8], store: impl Fn(f32) -> [u8; N]) {
    cells.as_chunks_mut().0.iter_mut().zip(values).for_each(|(cell, x)| *cell = store(*x));
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Isa, Origin, Rule, Shape, Tile, WeightFormat, Weights, WholeRule};

    fn recipe(moments: MomentFormat) -> Recipe {
        Recipe::new(Rule::AdamW { amsgrad: false }, WeightFormat::F32, moments).unwrap()
    }

    proptest! {
        #[test]
        fn what_was_read_is_read_again_after_it_was_written(
            values in prop::collection::vec(-1e3_f32..1e3, 1..700),
        ) {
            let elements = values.len();
            for moments in [MomentFormat::F32, MomentFormat::Bf16, MomentFormat::Blocks8] {
                let recipe = recipe(moments);
                let mut record = vec![0; recipe.record_bytes(elements).unwrap()];
                recipe.write_moment(&mut record, "exp_avg", &values).unwrap();
                let squares: Vec<f32> = values.iter().map(|x| x * x).collect();
                recipe.write_moment(&mut record, "exp_avg_sq", &squares).unwrap();
                for (name, given) in [("exp_avg", &values), ("exp_avg_sq", &squares)] {
                    let mut out = vec![0.0; elements];
                    recipe.read_moment(&record, elements, name, &mut out).unwrap();
                    match moments {
                        MomentFormat::F32 => prop_assert_eq!(&out, given),
                        MomentFormat::Bf16 => {
                            let close = |(a, b): (&f32, &f32)| (a - b).abs() <= b.abs() / 256.0;
                            prop_assert!(out.iter().zip(given).all(close));
                        }
                        MomentFormat::Blocks8 => {
                            let largest = given.iter().fold(0.0_f32, |x, y| x.max(y.abs()));
                            let close = |(a, b): (&f32, &f32)| {
                                (a - b).abs() <= b.abs() / 16.0 + largest * 2e-5
                            };
                            prop_assert!(out.iter().zip(given).all(close));
                        }
                    }
                    let before = record.clone();
                    recipe.write_moment(&mut record, name, &out).unwrap();
                    if moments != MomentFormat::Blocks8 {
                        prop_assert_eq!(&record, &before);
                    }
                }
            }
        }
    }

    #[test]
    fn fields_of_whole_parameters_are_read_and_written_by_name() {
        let recipe =
            WholeRecipe::new(WholeRule::Adafactor, WeightFormat::F16WithMaster, Shape::matrix(3, 5)).unwrap();
        assert_eq!(recipe.moment_names().unwrap(), [("row_var", 3), ("col_var", 5)]);
        let mut record = vec![0; recipe.layout().unwrap().bytes()];
        recipe.write_moment(&mut record, "col_var", &[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        let mut out = [0.0; 5];
        recipe.read_moment(&record, "col_var", &mut out).unwrap();
        assert_eq!(out, [1.0, 2.0, 3.0, 4.0, 5.0]);
        let mut out = [7.0; 3];
        recipe.read_moment(&record, "row_var", &mut out).unwrap();
        assert_eq!(out, [0.0; 3]);
        assert_eq!(recipe.read_moment(&record, "master", &mut out), Err(ApplyError::NoField));
    }

    #[test]
    fn masters_of_whole_parameters_are_those_that_were_given() {
        let values = [1.0_f32, -2.5, 1e-3, 3.000_01];
        for weights in [WeightFormat::F16WithMaster, WeightFormat::Bf16WithRemainder] {
            let recipe = WholeRecipe::new(WholeRule::Muon, weights, Shape::matrix(2, 2)).unwrap();
            let mut record = vec![0; recipe.layout().unwrap().bytes()];
            let mut cells = [0_u16; 4];
            let mut view = match weights {
                WeightFormat::F16WithMaster => Weights::F16(&mut cells),
                _ => Weights::Bf16(&mut cells),
            };
            let (isa, origin) = (Isa::detect(), Origin::default());
            let given = crate::Gradient::F32(&values);
            let _updated = recipe.initialize(isa, &mut record, view.reborrow(), given, origin).unwrap();
            let mut out = [0.0; 4];
            recipe.read_masters(&mut record, view, &mut out).unwrap();
            assert_eq!(out, values);
        }
        let recipe = recipe(MomentFormat::F32);
        let mut record = vec![0; recipe.record_bytes(1).unwrap()];
        let mut weight = [4.0_f32];
        let tile = Tile { record: &mut record, elements: 1, range: 0..1, weights: Weights::F32(&mut weight) };
        let mut out = [0.0];
        recipe.read_masters(tile, &mut out).unwrap();
        assert_eq!(out, [4.0]);
    }
}
