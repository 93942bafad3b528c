;; What reader.html spends its time on, four numbers at once.
;;
;; assets/reader.wasm is this file, compiled: wasmtime.wat2wasm of the Python package wasmtime
;; does it, and a test compares. The page carries it, see model.browser_network.
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
  (func (export "addProducts") (param $out i32) (param $x i32) (param $w i32) (param $count i32)
    (loop $next
      (v128.store (local.get $out) (f32x4.add (v128.load (local.get $out))
        (f32x4.mul (v128.load (local.get $x)) (v128.load (local.get $w)))))
      (local.set $out (i32.add (local.get $out) (i32.const 16)))
      (local.set $x (i32.add (local.get $x) (i32.const 16)))
      (local.set $w (i32.add (local.get $w) (i32.const 16)))
      (br_if $next (local.tee $count (i32.sub (local.get $count) (i32.const 4)))))))
