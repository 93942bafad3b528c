;; What reader.html spends its time on, four numbers at once.
;;
;; assets/reader.wasm is this file, compiled: what wasmtime.wat2wasm of the Python package wasmtime
;; makes of it, less the names, its last section. A test compares. The page carries it, see
;; model.browser_network.
;;
;; Rows of numbers in one memory, addressed in bytes. Numbers are of 4 bytes, and the rows of what
;; is written are of 16 numbers or a multiple, the unused ones 0.
(module
  (import "page" "memory" (memory 1))

  ;; (places, inputs) times (inputs, outputs) plus bias -> (places, outputs). $w holds, for each 16
  ;; of the outputs, their biases and then their weights for one input after the other.
  (func (export "matmul") (param $out i32) (param $x i32) (param $w i32)
      (param $places i32) (param $inputs i32) (param $outputs i32)
    (local $place i32) (local $input i32) (local $from i32) (local $to i32) (local $at i32)
    (local $left i32) (local $value v128)
    (local $a v128) (local $b v128) (local $c v128) (local $d v128)
    (local.set $left (local.get $outputs))
    (loop $outputs
      (local.set $from (local.get $x))
      (local.set $to (local.get $out))
      (local.set $place (local.get $places))
      (loop $place
        (local.set $at (local.get $w))
        (local.set $a (v128.load (local.get $at)))
        (local.set $b (v128.load offset=16 (local.get $at)))
        (local.set $c (v128.load offset=32 (local.get $at)))
        (local.set $d (v128.load offset=48 (local.get $at)))
        (local.set $input (local.get $inputs))
        (loop $input
          (local.set $at (i32.add (local.get $at) (i32.const 64)))
          (local.set $value (v128.load32_splat (local.get $from)))
          (local.set $from (i32.add (local.get $from) (i32.const 4)))
          (local.set $a (f32x4.add (local.get $a)
            (f32x4.mul (local.get $value) (v128.load (local.get $at)))))
          (local.set $b (f32x4.add (local.get $b)
            (f32x4.mul (local.get $value) (v128.load offset=16 (local.get $at)))))
          (local.set $c (f32x4.add (local.get $c)
            (f32x4.mul (local.get $value) (v128.load offset=32 (local.get $at)))))
          (local.set $d (f32x4.add (local.get $d)
            (f32x4.mul (local.get $value) (v128.load offset=48 (local.get $at)))))
          (br_if $input (local.tee $input (i32.sub (local.get $input) (i32.const 1)))))
        (v128.store (local.get $to) (local.get $a))
        (v128.store offset=16 (local.get $to) (local.get $b))
        (v128.store offset=32 (local.get $to) (local.get $c))
        (v128.store offset=48 (local.get $to) (local.get $d))
        (local.set $to (i32.add (local.get $to) (i32.shl (local.get $outputs) (i32.const 2))))
        (br_if $place (local.tee $place (i32.sub (local.get $place) (i32.const 1)))))
      (local.set $out (i32.add (local.get $out) (i32.const 64)))
      (local.set $w (i32.add (local.get $at) (i32.const 64)))
      (br_if $outputs (local.tee $left (i32.sub (local.get $left) (i32.const 16))))))

  ;; Adds to a row of $count numbers the products of two others.
  (func $addProducts (param $out i32) (param $x i32) (param $w i32) (param $count i32)
    (loop $next
      (v128.store (local.get $out) (f32x4.add (v128.load (local.get $out))
        (f32x4.mul (v128.load (local.get $x)) (v128.load (local.get $w)))))
      (local.set $out (i32.add (local.get $out) (i32.const 16)))
      (local.set $x (i32.add (local.get $x) (i32.const 16)))
      (local.set $w (i32.add (local.get $w) (i32.const 16)))
      (br_if $next (local.tee $count (i32.sub (local.get $count) (i32.const 4))))))

  ;; A 3x3 convolution of each channel by itself, zeros beyond the edges: (height, width, channels)
  ;; -> the same. $w holds a bias for each channel, then (9, channels).
  (func (export "depthwise") (param $out i32) (param $x i32) (param $w i32)
      (param $height i32) (param $width i32) (param $channels i32)
    (local $y i32) (local $column i32) (local $k i32) (local $dy i32) (local $dx i32)
    (local $size i32) (local $weights i32)
    (local.set $size (i32.shl (local.get $channels) (i32.const 2)))
    (loop $row
      (local.set $column (i32.const 0))
      (loop $place
        (memory.copy (local.get $out) (local.get $w) (local.get $size))
        (local.set $weights (local.get $w))
        (local.set $k (i32.const 0))
        (loop $neighbour
          (local.set $weights (i32.add (local.get $weights) (local.get $size)))
          (local.set $dy (i32.sub (i32.div_u (local.get $k) (i32.const 3)) (i32.const 1)))
          (local.set $dx (i32.sub (i32.rem_u (local.get $k) (i32.const 3)) (i32.const 1)))
          ;; Less than nothing is, unsigned, more than any size.
          (if (i32.and
              (i32.lt_u (i32.add (local.get $y) (local.get $dy)) (local.get $height))
              (i32.lt_u (i32.add (local.get $column) (local.get $dx)) (local.get $width)))
            (then (call $addProducts (local.get $out)
              (i32.add (local.get $x) (i32.mul (local.get $size)
                (i32.add (i32.mul (local.get $dy) (local.get $width)) (local.get $dx))))
              (local.get $weights) (local.get $channels))))
          (br_if $neighbour (i32.lt_u
            (local.tee $k (i32.add (local.get $k) (i32.const 1))) (i32.const 9))))
        (local.set $out (i32.add (local.get $out) (local.get $size)))
        (local.set $x (i32.add (local.get $x) (local.get $size)))
        (br_if $place (i32.lt_u
          (local.tee $column (i32.add (local.get $column) (i32.const 1))) (local.get $width))))
      (br_if $row (i32.lt_u
        (local.tee $y (i32.add (local.get $y) (i32.const 1))) (local.get $height)))))

  ;; GELU of a row of $count numbers, x (1 + erf(x / sqrt(2))) / 2, within 2e-7: erf(z) as z times
  ;; the quotient of two polynomials in z * z, z from -4 to 4, with the Eigen library's numbers.
  (func (export "gelu") (param $x i32) (param $count i32)
    (local $value v128) (local $z v128) (local $square v128) (local $over v128) (local $under v128)
    (local $most v128) (local $least v128) (local $root v128) (local $half v128) (local $unit v128)
    (local $p0 v128) (local $p2 v128) (local $p4 v128) (local $p6 v128) (local $p8 v128)
    (local $p10 v128) (local $p12 v128) (local $q0 v128) (local $q2 v128) (local $q4 v128)
    (local $q6 v128) (local $q8 v128)
    (local.set $most (f32x4.splat (f32.const 4)))
    (local.set $least (f32x4.splat (f32.const -4)))
    (local.set $root (f32x4.splat (f32.const 0.70710678)))
    (local.set $half (f32x4.splat (f32.const 0.5)))
    (local.set $unit (f32x4.splat (f32.const 1)))
    (local.set $p0 (f32x4.splat (f32.const -1.60960333262415e-02)))
    (local.set $p2 (f32x4.splat (f32.const -2.95459980854025e-03)))
    (local.set $p4 (f32x4.splat (f32.const -7.34990630326855e-04)))
    (local.set $p6 (f32x4.splat (f32.const -5.69250639462346e-05)))
    (local.set $p8 (f32x4.splat (f32.const -2.10102402082508e-06)))
    (local.set $p10 (f32x4.splat (f32.const 2.77068142495902e-08)))
    (local.set $p12 (f32x4.splat (f32.const -2.72614225801306e-10)))
    (local.set $q0 (f32x4.splat (f32.const -1.42647390514189e-02)))
    (local.set $q2 (f32x4.splat (f32.const -7.37332916720468e-03)))
    (local.set $q4 (f32x4.splat (f32.const -1.68282697438203e-03)))
    (local.set $q6 (f32x4.splat (f32.const -2.13374055278905e-04)))
    (local.set $q8 (f32x4.splat (f32.const -1.45660718464996e-05)))
    (loop $next
      (local.set $value (v128.load (local.get $x)))
      (local.set $z (f32x4.pmax (local.get $least) (f32x4.pmin (local.get $most)
        (f32x4.mul (local.get $value) (local.get $root)))))
      (local.set $square (f32x4.mul (local.get $z) (local.get $z)))
      (local.set $over (local.get $p12))
      (local.set $over (f32x4.add (local.get $p10)
        (f32x4.mul (local.get $over) (local.get $square))))
      (local.set $over (f32x4.add (local.get $p8)
        (f32x4.mul (local.get $over) (local.get $square))))
      (local.set $over (f32x4.add (local.get $p6)
        (f32x4.mul (local.get $over) (local.get $square))))
      (local.set $over (f32x4.add (local.get $p4)
        (f32x4.mul (local.get $over) (local.get $square))))
      (local.set $over (f32x4.add (local.get $p2)
        (f32x4.mul (local.get $over) (local.get $square))))
      (local.set $over (f32x4.add (local.get $p0)
        (f32x4.mul (local.get $over) (local.get $square))))
      (local.set $under (local.get $q8))
      (local.set $under (f32x4.add (local.get $q6)
        (f32x4.mul (local.get $under) (local.get $square))))
      (local.set $under (f32x4.add (local.get $q4)
        (f32x4.mul (local.get $under) (local.get $square))))
      (local.set $under (f32x4.add (local.get $q2)
        (f32x4.mul (local.get $under) (local.get $square))))
      (local.set $under (f32x4.add (local.get $q0)
        (f32x4.mul (local.get $under) (local.get $square))))
      (v128.store (local.get $x) (f32x4.mul (f32x4.mul (local.get $value) (local.get $half))
        (f32x4.add (local.get $unit)
          (f32x4.div (f32x4.mul (local.get $z) (local.get $over)) (local.get $under)))))
      (local.set $x (i32.add (local.get $x) (i32.const 16)))
      (br_if $next (local.tee $count (i32.sub (local.get $count) (i32.const 4)))))))
