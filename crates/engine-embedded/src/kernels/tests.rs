use proptest::prelude::*;

use super::{attention::AttentionScratch, rows::exp, *};
use crate::{
    KvPool, VecPool,
    hash::SplitMix,
    model::KeySigns,
    pool::SequenceKv,
    quant::{BLOCK, Encoding, Matrix},
};

/// Numbers in -1..1, drawn from a seed.
fn numbers(random: &mut SplitMix, count: usize) -> Vec<f32> {
    (0..count).map(|_| (random.next() >> 40) as f32 / (1 << 23) as f32 - 1.0).collect()
}

/// A matrix of random encoded blocks, whose scales are halves between 0.001 and 1.
fn matrix(random: &mut SplitMix, encoding: Encoding, outputs: usize, inputs: usize) -> Matrix {
    let halves = if encoding == Encoding::Q4_1 { 2 } else { 1 };
    let mut bytes = Vec::new();
    for _ in 0..outputs * inputs / BLOCK {
        for _ in 0..halves {
            bytes.extend((0x1400_u16 + (random.next() % 0x2800) as u16).to_le_bytes());
        }
        bytes.extend((0..encoding.block_bytes() - 2 * halves).map(|_| random.next() as u8));
    }
    Matrix::pack(encoding, &bytes, outputs, inputs).expect("finite scales")
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Runs one operation with each instruction set and insists on the same bits; returns them.
fn on_all_sets(mut run: impl FnMut(Kernels) -> Vec<f32>) -> Vec<f32> {
    let expected = run(InstructionSet::Scalar.kernels().expect("always there"));
    for set in InstructionSet::available() {
        let found = run(set.kernels().expect("available"));
        assert!(bits(&found) == bits(&expected), "{set} differs from scalar");
    }
    expected
}

fn quantise(x: &[f32]) -> Vec<ActivationBlock> {
    let mut out = vec![ActivationBlock::ZERO; x.len() / BLOCK];
    InstructionSet::Scalar.kernels().expect("always there").run(Quantise { x, out: &mut out });
    out
}

#[test]
fn the_processor_has_what_it_detects() {
    let sets = InstructionSet::available();
    assert_eq!(sets[0], InstructionSet::Scalar);
    assert_eq!(sets.last(), Some(&InstructionSet::detect()));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn products_have_the_same_bits_on_all_sets_and_in_all_batches(
        seed: u64,
        outputs in 1_usize..70,
        blocks in 1_usize..6,
        rows in 1_usize..20,
        encoding in prop::sample::select(vec![Encoding::Q4_1, Encoding::Q8_0, Encoding::Q4_0]),
    ) {
        let mut random = SplitMix::new(seed);
        let inputs = blocks * BLOCK;
        let matrix = matrix(&mut random, encoding, outputs, inputs);
        let x = numbers(&mut random, rows * inputs);
        let quantised = quantise(&x);
        let multiply = |kernels: Kernels, x: &[ActivationBlock]| {
            let mut out = vec![0.0; x.len() / blocks * outputs];
            kernels.run(MatMul { matrix: &matrix, x, out: &mut out });
            out
        };
        let together = on_all_sets(|kernels| multiply(kernels, &quantised));
        for row in 0..rows {
            let alone = on_all_sets(|kernels| multiply(kernels, &quantised[row * blocks..(row + 1) * blocks]));
            prop_assert_eq!(bits(&alone), bits(&together[row * outputs..(row + 1) * outputs]));
        }
        // And it is a product: against doubles, from the same quantised activations.
        let mut weights = vec![0.0; inputs];
        for output in 0..outputs {
            matrix.decode_row(output, &mut weights);
            for row in 0..rows {
                let (mut sum, mut size) = (0.0, 0.0);
                for (i, w) in weights.iter().enumerate() {
                    let block = &quantised[row * blocks + i / BLOCK];
                    let term = f64::from(*w) * f64::from(block.scale) * f64::from(block.quants[i % BLOCK]);
                    (sum, size) = (sum + term, size + term.abs());
                }
                let found = f64::from(together[row * outputs + output]);
                prop_assert!((found - sum).abs() <= 1e-5 * size + 1e-6, "{found} is not {sum}");
            }
        }
    }

    #[test]
    fn row_operations_have_the_same_bits_on_all_sets(seed: u64, blocks in 1_usize..8, power in -20_i32..20) {
        let mut random = SplitMix::new(seed);
        let mut x = numbers(&mut random, 2 * blocks * BLOCK);
        x.iter_mut().for_each(|x| *x *= 2.0_f32.powi(power));
        let y = numbers(&mut random, x.len());
        let weight = numbers(&mut random, blocks * BLOCK);
        let decode = |blocks: &[ActivationBlock]| -> Vec<f32> {
            let block = |block: &ActivationBlock| {
                let sum: i32 = block.quants.iter().map(|quant| i32::from(*quant)).sum();
                assert_eq!(sum, block.sum);
                let extra = [block.scale, block.scaled_sum];
                block.quants.map(|quant| f32::from(quant) * block.scale).into_iter().chain(extra).collect::<Vec<_>>()
            };
            blocks.iter().flat_map(block).collect()
        };
        let run = |operation: &dyn Fn(Kernels, &mut [ActivationBlock])| {
            on_all_sets(|kernels| {
                let mut out = vec![ActivationBlock::ZERO; x.len() / BLOCK];
                operation(kernels, &mut out);
                decode(&out)
            })
        };
        let close = |found: &[f32], expected: &dyn Fn(usize) -> f32| {
            for (block, found) in found.chunks_exact(BLOCK + 2).enumerate() {
                for (i, found_value) in found[..BLOCK].iter().enumerate() {
                    let expected = expected(block * BLOCK + i);
                    let step = found[BLOCK];
                    assert!((found_value - expected).abs() <= 0.51 * step + 1e-6 * expected.abs());
                }
            }
        };
        let found = run(&|kernels, out| kernels.run(Quantise { x: &x, out }));
        close(&found, &|i| x[i]);
        let found = run(&|kernels, out| kernels.run(GateAndQuantise { gate: &x, up: &y, out }));
        close(&found, &|i| x[i] / (1.0 + (-x[i]).exp()) * y[i]);
        let found = run(&|kernels, out| {
            kernels.run(NormAndQuantise { x: &x, weight: &weight, epsilon: 1e-5, out });
        });
        let width = weight.len();
        close(&found, &|i| {
            let row = &x[i / width * width..(i / width + 1) * width];
            let mean = row.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
            (f64::from(x[i]) / (mean + 1e-5).sqrt() * f64::from(weight[i % width])) as f32
        });
    }

    #[test]
    fn attention_has_the_same_bits_on_all_sets_and_is_attention(
        seed: u64,
        start in 0_usize..60,
        rows in 1_usize..20,
        kv_heads in 1_usize..3,
        group in 1_usize..6,
        vectors in 1_usize..6,
    ) {
        check_attention(seed, start, rows, kv_heads, kv_heads * group, vectors * LANES);
    }

    #[test]
    fn the_exponential_is_one(x in -86.0_f32..87.0) {
        let found = f64::from(exp(scalar::Scalar, [x; LANES])[3]);
        let expected = f64::from(x).exp();
        prop_assert!((found - expected).abs() <= 3e-7 * expected);
    }
}

fn check_attention(seed: u64, start: usize, rows: usize, kv_heads: usize, heads: usize, dims: usize) {
    const BLOCK_SIZE: usize = 16;
    let mut random = SplitMix::new(seed);
    let length = start + rows;
    let (width, kv_width) = (heads * dims, kv_heads * dims);
    let queries = numbers(&mut random, rows * width);
    let (k, v) = (numbers(&mut random, length * kv_width), numbers(&mut random, length * kv_width));
    let signs = KeySigns::new(kv_width as u32, length as u32);
    let blocks = length.div_ceil(BLOCK_SIZE) as u32;
    let mut pool = VecPool::new(blocks, (2 * BLOCK_SIZE * kv_width * 4) as u64, BLOCK_SIZE as u32);
    // Slots beyond the sequence hold what should poison whoever reads it.
    (0..blocks).for_each(|block| pool.payload_mut(block).fill(f32::NAN));
    let pointers: Vec<_> = (0..blocks).rev().map(|block| pool.block(block)).collect();
    // SAFETY: the pointers are the pool's, whose blocks hold one layer; slices that the kernels take end with them.
    let kv = unsafe { SequenceKv::new(&pointers, BLOCK_SIZE, 0, kv_width) };
    for position in 0..length {
        let range = position * kv_width..(position + 1) * kv_width;
        let signed: Vec<f32> =
            k[range.clone()].iter().zip(signs.tile(position / LANES)).map(|(x, sign)| x * sign).collect();
        kv.write(position, &signed, &v[range]);
    }
    let out = on_all_sets(|kernels| {
        let mut out = vec![0.0; rows * width];
        kernels.run(Attention {
            queries: &queries,
            out: &mut out,
            start,
            kv,
            key_signs: &signs,
            heads,
            kv_heads,
            head_dim: dims,
            scratch: &mut AttentionScratch::default(),
        });
        out
    });
    for row in 0..rows {
        for head in 0..heads {
            let query = &queries[row * width + head * dims..][..dims];
            let kv_head = head / (heads / kv_heads);
            let at = |values: &[f32], position: usize, dim: usize| {
                f64::from(values[position * kv_width + kv_head * dims + dim])
            };
            let score = |position| (0..dims).map(|d| f64::from(query[d]) * at(&k, position, d)).sum::<f64>();
            let weights: Vec<f64> = (0..=start + row).map(|position| score(position).exp()).collect();
            let sum: f64 = weights.iter().sum();
            for dim in 0..dims {
                let expected: f64 = weights.iter().enumerate().map(|(p, w)| w / sum * at(&v, p, dim)).sum();
                let found = f64::from(out[row * width + head * dims + dim]);
                assert!((found - expected).abs() < 2e-5, "row {row} head {head}: {found} is not {expected}");
            }
        }
    }
}
