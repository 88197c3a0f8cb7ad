//! scratch: tile rate vs peak
use qkv_gemm::{TileOp, with_tile, tile::*};
use qkv_simd::{Isa, Simd, SimdOp};
use std::time::Instant;

struct Peak(usize);
impl SimdOp for Peak {
    type Output = f32;
    #[inline(always)]
    fn eval<S: Simd>(self, s: S) -> f32 {
        let mut acc = [s.zero(); 12];
        let a = s.splat(std::hint::black_box(1.0));
        let b = s.splat(std::hint::black_box(1e-9));
        for _ in 0..self.0 { for x in acc.iter_mut() { *x = s.mul_add(a, b, *x); } }
        let mut t = s.zero();
        for x in acc { t = s.add(t, x); }
        s.reduce_add(t)
    }
}
struct Run<'a> { a: &'a [f32], b: &'a [f32], c: &'a mut [f32], depth: usize, kind: usize, reps: usize, rs: usize }
impl TileOp for Run<'_> {
    type Output = usize;
    #[inline(always)]
    fn eval<S: Simd, const MR: usize, const NV: usize>(self, s: S) -> usize {
        let nr = NV * S::LANES;
        for r in 0..self.reps {
            let rhs = Rhs { ptr: self.b.as_ptr(), stride: nr as isize };
            let tiles = 16;
            for t in 0..tiles {
            let acc: Acc<S, MR, NV> = unsafe { match self.kind {
                0 => tile::<S, _, MR, NV>(s, self.depth, Columns { ptr: self.a.as_ptr().add(t*MR*self.depth), stride: MR as isize }, rhs),
                1 => tile::<S, _, MR, NV>(s, self.depth, Rows { ptr: self.a.as_ptr().add(t*MR*self.rs), stride: self.rs as isize }, rhs),
                _ => tile::<S, _, MR, NV>(s, self.depth, Columns { ptr: self.a.as_ptr().add((t%10)*MR), stride: self.rs as isize }, rhs),
            }};
            let c = &mut self.c[((r+t)%4)*MR*nr..];
            for i in 0..MR { for v in 0..NV { s.store(acc[i][v], &mut c[(i*NV+v)*S::LANES..]); } }
            }
        }
        16*self.reps * MR * nr * self.depth * 2
    }
}
fn main() {
    let isa = Isa::active().unwrap();
    let a = vec![1e-3f32; 1<<20]; let b = vec![1e-3f32; 1<<16]; let mut c = vec![0f32; 4096];
    for _ in 0..3 {
        let n = 20_000_000; let t = Instant::now(); let x = isa.dispatch(Peak(n)); 
        let peak = (n*12*2*isa.lanes()) as f64 / t.elapsed().as_secs_f64() / 1e9;
        println!("peak {peak:.1} {x}");
        for (depth, rs) in [(64,64),(96,64),(128,128),(256,256),(96,128),(96,768)] {
            for kind in 0..3 {
                let t = Instant::now();
                let f = with_tile(isa, Run { a: &a, b: &b, c: &mut c, depth, kind, reps: 400_000_0/depth/3, rs });
                let g = f as f64 / t.elapsed().as_secs_f64() / 1e9;
                print!("depth {depth} rs {rs} kind {kind}: {:.1} %   ", g/peak*100.);
            }
            println!();
        }
    }
}
