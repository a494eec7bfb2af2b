"""Whether the simulator sees the faults it is there for: python3 selftest.py OUT (as build.sh made it)"""
import array, ctypes as C, math, os, random, subprocess, sys, threading

card_folder = os.path.abspath(sys.argv[1])
STREAM = C.c_void_p(2)

class Card:
    def __init__(self):
        self.lib = C.CDLL(f"{card_folder}/libcuda.so.1")
        self.bind()
    def bind(self):
        context = C.c_void_p()
        self.lib.cuDevicePrimaryCtxRetain(C.byref(context), 0)
        self.lib.cuCtxSetCurrent(context)
    def alloc(self, size):
        p = C.c_uint64()
        return p if self.lib.cuMemAllocAsync(C.byref(p), C.c_size_t(size), STREAM) == 0 else None
    def put(self, data):
        p = self.alloc(len(data))
        self.lib.cuMemcpyHtoDAsync_v2(p, bytes(data), C.c_size_t(len(data)), STREAM)
        return p
    def get(self, p, n):
        r = (C.c_float * n)()
        self.lib.cuMemcpyDtoHAsync_v2(r, p, C.c_size_t(4 * n), STREAM)
        return list(r)
    def launch(self, name, grid, block, *args):
        parameters = ", ".join(".param .b8 p" for _ in args)
        module, function = C.c_void_p(), C.c_void_p()
        self.lib.cuModuleLoadData(C.byref(module), f"//\n.version\n.entry {name}({parameters})\n".encode())
        assert self.lib.cuModuleGetFunction(C.byref(function), module, name.encode()) == 0
        pointers = (C.c_void_p * len(args))(*[C.cast(C.pointer(a), C.c_void_p) for a in args])
        return self.lib.cuLaunchKernel(function, *grid, *block, 0, STREAM, pointers, None)

size, integer = C.c_uint64, C.c_int

def sums():
    card, n = Card(), 5000
    x = array.array("f", [random.random() for _ in range(3 * n)])
    source, out, info = card.put(x.tobytes()), card.alloc(12), card.put(array.array("Q", [3, n, n, 1]).tobytes())
    card.launch("fast_sum_f32", (3, 1, 1), (1024, 1, 1), size(3 * n), size(n), size(2), info, source, out)
    assert all(abs(a - sum(x[i * n:(i + 1) * n])) < 0.01 for i, a in enumerate(card.get(out, 3)))
    out = card.alloc(12 * n)
    card.launch("softmax_f32", (3, 1, 1), (1, 32, 1), source, out, integer(n))
    got, total = card.get(out, n), sum(map(math.exp, x[:n]))
    assert all(abs(a - math.exp(b) / total) < 1e-9 for a, b in zip(got, x))
def half_warp(): # a block of 16 threads: lanes shuffle with lanes that are not there
    card = Card()
    source, out, info = card.put(bytes(400)), card.alloc(4), card.put(array.array("Q", [1, 100, 100, 1]).tobytes())
    card.launch("fast_sum_f32", (1, 1, 1), (16, 1, 1), size(100), size(100), size(2), info, source, out)
def freed():
    card = Card()
    source, out = card.put(bytes(400)), card.alloc(400)
    card.lib.cuMemFreeAsync(source, STREAM)
    card.launch("ucopy_f32", (1, 1, 1), (128, 1, 1), size(100), size(1), size(0), source, out)
def overrun(): # SIM_GUARD
    card = Card()
    source, out = card.put(bytes(400)), card.alloc(400)
    card.launch("ucopy_f32", (1, 1, 1), (1024, 1, 1), size(1000), size(1), size(0), source, out)
def two_streams(): # SIM_STRICT
    card = Card()
    source = card.put(bytes(400))
    def other():
        card.bind()
        card.launch("ucopy_f32", (1, 1, 1), (128, 1, 1), size(100), size(1), size(0), source, card.alloc(400))
    thread = threading.Thread(target=other)
    thread.start(); thread.join()
def awaited(): # SIM_STRICT
    card = Card()
    source = card.put(bytes(400))
    card.lib.cuStreamSynchronize(STREAM)
    def other():
        card.bind()
        assert card.launch("ucopy_f32", (1, 1, 1), (128, 1, 1), size(100), size(1), size(0), source, card.alloc(400)) == 0
    thread = threading.Thread(target=other)
    thread.start(); thread.join()
def too_many_threads():
    card = Card()
    assert card.launch("ucopy_f32", (1, 1, 1), (2048, 1, 1), size(0), size(1), size(0), card.alloc(4), card.alloc(4)) == 1
def full(): # SIM_MEMORY
    card = Card()
    assert card.alloc(600) and card.alloc(1000) is None
def unwritten():
    card = Card()
    assert all(math.isnan(x) for x in card.get(card.alloc(40), 10))

if len(sys.argv) > 2:
    globals()[sys.argv[2]]()
    sys.exit()
tests = [("sums", None, {}), ("half_warp", "does not take part", {}), ("freed", "no live device memory", {}), ("overrun", -11, {"SIM_GUARD": "1"}),
         ("two_streams", "nothing awaited", {"SIM_STRICT": "1"}), ("awaited", None, {"SIM_STRICT": "1"}), ("too_many_threads", None, {}),
         ("full", None, {"SIM_MEMORY": "2000"}), ("unwritten", None, {})]
bad = 0
for name, expected, settings in tests:
    p = subprocess.run([sys.executable, __file__, card_folder, name], capture_output=True, text=True, env={**os.environ, **settings})
    ok = p.returncode == 0 if expected is None else p.returncode == expected if isinstance(expected, int) else p.returncode != 0 and expected in p.stderr
    bad += not ok
    print("ok   " if ok else "FAILS", name, "" if ok else (p.returncode, p.stderr[-300:]))
sys.exit(bad > 0)
