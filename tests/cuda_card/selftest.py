"""Whether the card sees the faults that it is there for: python3 selftest.py OUT (as build.sh made it)

Each case runs in a process of its own. One that must be caught says by what: a word of the message or the exit status.
"""

import array
import ctypes as C
import math
import os
import random
import subprocess
import sys
import threading

OUT = os.path.abspath(sys.argv[1])
OWN = C.c_void_p(2)  # the thread's own stream
size, integer, single = C.c_uint64, C.c_int, C.c_float


class Card:
    """A device as a thread uses it."""

    def __init__(self, device=0):
        self.device = device
        self.lib = C.CDLL(f"{OUT}/libcuda.so.1")
        self.functions = {}
        self.bind()

    def bind(self):
        context = C.c_void_p()
        assert self.lib.cuDevicePrimaryCtxRetain(C.byref(context), self.device) == 0
        self.lib.cuCtxSetCurrent(context)

    def stream(self):
        stream = C.c_void_p()
        assert self.lib.cuStreamCreate(C.byref(stream), 1) == 0
        return stream

    def event(self, flags=0):
        event = C.c_void_p()
        assert self.lib.cuEventCreate(C.byref(event), flags) == 0
        return event

    def alloc(self, bytes, stream=OWN):
        p = C.c_uint64()
        return p if self.lib.cuMemAllocAsync(C.byref(p), C.c_size_t(bytes), stream) == 0 else None

    def put(self, data, stream=OWN):
        p = self.alloc(len(data), stream)
        assert self.lib.cuMemcpyHtoDAsync_v2(p, bytes(data), C.c_size_t(len(data)), stream) == 0
        return p

    def put_floats(self, values, stream=OWN):
        return self.put(array.array("f", values).tobytes(), stream)

    def get(self, p, n, stream=OWN):
        r = (C.c_float * n)()
        assert self.lib.cuMemcpyDtoHAsync_v2(r, p, C.c_size_t(4 * n), stream) == 0
        return list(r)

    def function(self, name, parameters):
        if name not in self.functions:
            module, function = C.c_void_p(), C.c_void_p()
            listed = ", ".join([".param .b8 p"] * parameters)
            text = f"//\n.version 8.0\n.entry {name}({listed})\n".encode()
            assert self.lib.cuModuleLoadData(C.byref(module), text) == 0
            assert self.lib.cuModuleGetFunction(C.byref(function), module, name.encode()) == 0
            self.functions[name] = function
        return self.functions[name]

    def launch(self, name, grid, block, *args, stream=OWN, shared=0):
        function = self.function(name, len(args))
        pointers = (C.c_void_p * len(args))(*[C.cast(C.pointer(a), C.c_void_p) for a in args])
        return self.lib.cuLaunchKernel(function, *grid, *block, shared, stream, pointers, None)

    def copy(self, source, to, n, stream=OWN, threads=128):
        return self.launch("ucopy_f32", (1, 1, 1), (threads, 1, 1), size(n), size(1), size(0), source, to, stream=stream)

    def affine(self, source, to, n, by, plus, stream=OWN):
        args = size(n), size(1), size(0), source, to, single(by), single(plus)
        return self.launch("affine_f32", (1, 1, 1), (128, 1, 1), *args, stream=stream)

    # Graphs. A kernel is loaded before: a capture refuses that.
    def begin(self, stream=OWN, mode=0):
        self.function("affine_f32", 7)
        return self.lib.cuStreamBeginCapture_v2(stream, mode)

    def end(self, stream=OWN):
        graph = C.c_void_p()
        return self.lib.cuStreamEndCapture(stream, C.byref(graph)), graph

    def program(self, graph, flags=0):
        program = C.c_void_p()
        assert self.lib.cuGraphInstantiateWithFlags(C.byref(program), graph, C.c_ulonglong(flags)) == 0
        return program


def in_thread(work):
    """A thread's assertions are the process's."""
    failed = []

    def run():
        try:
            work()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


# ---- kernels


def sums():
    card, n = Card(), 5000
    x = array.array("f", [random.random() for _ in range(3 * n)])
    source, out, info = card.put(x.tobytes()), card.alloc(12), card.put(array.array("Q", [3, n, n, 1]).tobytes())
    card.launch("fast_sum_f32", (3, 1, 1), (1024, 1, 1), size(3 * n), size(n), size(2), info, source, out)
    assert all(abs(a - sum(x[i * n : (i + 1) * n])) < 0.01 for i, a in enumerate(card.get(out, 3)))
    out = card.alloc(12 * n)
    card.launch("softmax_f32", (3, 1, 1), (1, 32, 1), source, out, integer(n))
    got, total = card.get(out, n), sum(map(math.exp, x[:n]))
    assert all(abs(a - math.exp(b) / total) < 1e-9 for a, b in zip(got, x))


def half_warp():  # a block of 16 threads: lanes shuffle with lanes that are not there
    card = Card()
    source, out, info = card.put(bytes(400)), card.alloc(4), card.put(array.array("Q", [1, 100, 100, 1]).tobytes())
    card.launch("fast_sum_f32", (1, 1, 1), (16, 1, 1), size(100), size(100), size(2), info, source, out)


def too_many_threads():
    card = Card()
    assert card.copy(card.alloc(4), card.alloc(4), 0, threads=2048) == 1


def shared_memory_that_was_not_asked_for():
    card = Card()
    source, out = card.put(bytes(400)), card.alloc(400)
    args = size(100), size(1), size(0), source, out

    def launch(shared):
        return card.launch("ucopy_f32", (1, 1, 1), (128, 1, 1), *args, shared=shared)

    function = card.function("ucopy_f32", len(args))
    assert launch(49153) == 1
    assert card.lib.cuFuncSetAttribute(function, 8, 99 * 1024 + 1) == 1
    assert card.lib.cuFuncSetAttribute(function, 8, 99 * 1024) == 0
    assert launch(49153) == 0 and launch(99 * 1024 + 1) == 1
    assert card.lib.cuFuncSetAttribute(function, 3, 1) == 1


def a_newer_ptx():  # SIM_DRIVER
    card, module = Card(), C.c_void_p()

    def load(version):
        return card.lib.cuModuleLoadData(C.byref(module), f"//\n.version {version}\n".encode())

    assert load("8.4") == 0 and load("8.5") == 222 and load("9.0") == 222


def reversed_by(kernel):
    """64 numbers in the opposite order, through shared memory; one that a thread had not written yet is not a number."""
    card, n = Card(), 64
    out = card.alloc(4 * n)
    assert card.launch(kernel, (1, 1, 1), (n, 1, 1), card.put_floats(range(n)), out, shared=4 * n) == 0
    return card.get(out, n)


def a_barrier():  # SIM_REVERSE, and not
    assert reversed_by("selftest_reversed") == [63 - i for i in range(64)]


def a_barrier_that_is_not_there():  # SIM_REVERSE, and not
    missing = [i for i, value in enumerate(reversed_by("selftest_reversed_too_early")) if math.isnan(value)]
    assert missing == list(range(32, 64) if os.environ.get("SIM_REVERSE") else range(32)), missing


# ---- memory


def freed():
    card = Card()
    source, out = card.put(bytes(400)), card.alloc(400)
    card.lib.cuMemFreeAsync(source, OWN)
    card.copy(source, out, 100)


def freed_twice():
    card = Card()
    source = card.put(bytes(400))
    card.lib.cuMemFreeAsync(source, OWN)
    card.lib.cuMemFreeAsync(source, OWN)


def overrun():  # SIM_GUARD
    card = Card()
    card.copy(card.put(bytes(400)), card.alloc(400), 1000, threads=1024)


def no_overrun():  # SIM_GUARD
    card = Card()
    assert card.copy(card.put(bytes(400)), card.alloc(400), 100) == 0


def a_copy_too_long():
    card = Card()
    card.lib.cuMemcpyDtoDAsync_v2(card.alloc(400), card.put(bytes(500)), C.c_size_t(500), OWN)


def full():  # SIM_MEMORY
    card = Card()
    assert card.alloc(600) and card.alloc(1000) is None
    free, total = C.c_size_t(), C.c_size_t()
    assert card.lib.cuMemGetInfo_v2(C.byref(free), C.byref(total)) == 0
    assert (free.value, total.value) == (2000 - 1024, 2000)


def unwritten():
    card = Card()
    assert all(math.isnan(x) for x in card.get(card.alloc(40), 10))


def the_other_card():  # SIM_DEVICES
    first, second = Card(0), Card(1)
    second.bind()
    theirs = second.put(bytes(400))
    first.bind()
    ours = first.alloc(400)
    first.copy(theirs, ours, 100)


def two_cards():  # SIM_DEVICES
    for card in [Card(0), Card(1)]:
        card.bind()
        to = card.alloc(400)
        assert card.copy(card.put_floats([3] * 100), to, 100) == 0 and card.get(to, 100) == [3] * 100
    assert card.lib.cuDevicePrimaryCtxRetain(C.byref(C.c_void_p()), 0) == 0
    assert card.lib.cuDeviceGet(C.byref(integer()), 2) == 101


# ---- streams, all with SIM_STRICT


def two_streams():
    card = Card()
    source = card.put(bytes(400))

    def other():
        card.bind()
        card.copy(source, card.alloc(400), 100)

    in_thread(other)


def awaited():
    card = Card()
    source = card.put(bytes(400))
    card.lib.cuStreamSynchronize(OWN)

    def other():
        card.bind()
        assert card.copy(source, card.alloc(400), 100) == 0

    in_thread(other)


def after_an_event(record_first):
    card = Card()
    one, two, event = card.stream(), card.stream(), card.event()
    source = card.put(bytes(400), one)
    if record_first:
        card.lib.cuEventRecord(event, one)
    to = card.alloc(400, one)
    card.copy(source, to, 100, one)
    if not record_first:
        card.lib.cuEventRecord(event, one)
    assert card.lib.cuStreamWaitEvent(two, event, 0) == 0
    assert card.copy(to, card.alloc(400, two), 100, two) == 0


def after_its_event():
    after_an_event(False)


def after_an_event_too_early():
    after_an_event(True)


def through_a_third_stream():
    card = Card()
    one, two, three, first, second = card.stream(), card.stream(), card.stream(), card.event(), card.event()
    source = card.put(bytes(400), one)
    card.lib.cuEventRecord(first, one)
    card.lib.cuStreamWaitEvent(two, first, 0)
    card.lib.cuEventRecord(second, two)
    card.lib.cuStreamWaitEvent(three, second, 0)
    assert card.copy(source, card.alloc(400, three), 100, three) == 0


def a_free_on_another_stream():
    card = Card()
    one, two = card.stream(), card.stream()
    card.lib.cuMemFreeAsync(card.put(bytes(400), one), two)


def a_library_on_another_stream():
    card, library = Card(), C.CDLL(f"{OUT}/libcublas.so.13")
    one, two, handle = card.stream(), card.stream(), C.c_void_p()
    a, c = card.put_floats([1] * 4, one), card.alloc(16, two)
    assert library.cublasCreate_v2(C.byref(handle)) == 0
    library.cublasSetStream_v2(handle, two)
    multiply(library, handle, a, a, c)


def a_stream_that_is_gone():
    card = Card()
    stream = card.stream()
    assert card.lib.cuStreamDestroy_v2(stream) == 0
    card.alloc(4, stream)


def multiply(library, handle, a, b, c):
    """c = a b, two by two."""
    one, none, f32, stride = single(1), single(0), 0, C.c_longlong(0)
    two = integer(2)
    return library.cublasGemmStridedBatchedEx(
        handle, 0, 0, two, two, two, C.byref(one), a, f32, two, stride, b, f32, two, stride,
        C.byref(none), c, f32, two, stride, 1, 68, 0,
    )  # fmt: skip


def clock():
    card, milliseconds = Card(), single()
    start, end, untimed = card.event(), card.event(), card.event(2)
    assert card.lib.cuEventElapsedTime_v2(C.byref(milliseconds), start, end) == 400, "events that were never recorded"
    for event in [start, untimed]:
        card.lib.cuEventRecord(event, OWN)
    card.affine(card.put(bytes(4 * 100000)), card.alloc(4 * 100000), 100000, 1, 0)
    card.lib.cuEventRecord(end, OWN)
    assert card.lib.cuEventElapsedTime_v2(C.byref(milliseconds), start, end) == 0
    assert 0 < milliseconds.value < 10000
    assert card.lib.cuEventElapsedTime_v2(C.byref(milliseconds), untimed, end) == 400


# ---- graphs


def replay():
    card, library, handle = Card(), C.CDLL(f"{OUT}/libcublas.so.13"), C.c_void_p()
    stream = card.stream()
    assert library.cublasCreate_v2(C.byref(handle)) == 0
    library.cublasSetStream_v2(handle, stream)
    x, out = card.put_floats([1, 2, 3, 4], stream), card.put_floats([0] * 4, stream)

    def work():
        between = card.alloc(16, stream)
        assert card.affine(x, between, 4, 2, 1, stream) == 0
        assert multiply(library, handle, between, x, out) == 0
        assert card.lib.cuMemFreeAsync(between, stream) == 0
        assert card.lib.cuMemcpyDtoDAsync_v2(x, out, C.c_size_t(16), stream) == 0

    assert card.begin(stream) == 0
    work()
    status, graph = card.end(stream)
    assert status == 0
    assert card.get(x, 4, stream) == [1, 2, 3, 4], "what is captured is not done"
    program, captured, expected = card.program(graph), [], []
    assert card.lib.cuGraphDestroy(graph) == 0, "a program does not need its graph"
    for _ in range(3):
        assert card.lib.cuGraphLaunch(program, stream) == 0
        captured.append(card.get(x, 4, stream))
    assert card.lib.cuMemcpyHtoDAsync_v2(x, array.array("f", [1, 2, 3, 4]).tobytes(), C.c_size_t(16), stream) == 0
    for _ in range(3):
        work()
        expected.append(card.get(x, 4, stream))
    assert captured == expected and expected[0] != expected[1], (captured, expected)
    assert card.lib.cuGraphExecDestroy(program) == 0
    assert card.lib.cuGraphLaunch(program, stream) == 400


def counts_of_a_replay():
    card = Card()
    x = card.put_floats([1])
    card.begin()
    card.affine(x, x, 1, 1, 0)
    program = card.program(card.end()[1])
    for _ in range(5):
        card.lib.cuGraphLaunch(program, OWN)


def refused(call, status=900):
    """`call` while capturing: refused, and nothing comes of the capture."""
    card, state = Card(), integer()
    stream = card.stream()
    x, event = card.put_floats([1], stream), card.event()
    card.lib.cuStreamSynchronize(stream)
    assert card.begin(stream) == 0
    assert card.lib.cuStreamIsCapturing(stream, C.byref(state)) == 0 and state.value == 1
    assert call(card, stream, x, event) == status
    assert card.lib.cuStreamIsCapturing(stream, C.byref(state)) == 0 and state.value == 2
    assert card.affine(x, x, 1, 1, 0, stream) == 901
    ended, graph = card.end(stream)
    assert ended == 901 and not graph.value
    assert card.lib.cuStreamIsCapturing(stream, C.byref(state)) == 0 and state.value == 0
    assert card.get(x, 1, stream) == [1]


def refused_while_capturing():
    room = (C.c_float * 1)()
    refused(lambda card, stream, x, event: card.lib.cuStreamSynchronize(stream))
    refused(lambda card, stream, x, event: card.lib.cuCtxSynchronize())
    refused(lambda card, stream, x, event: card.lib.cuStreamQuery(stream))
    refused(lambda card, stream, x, event: card.lib.cuMemcpyDtoHAsync_v2(room, x, C.c_size_t(4), stream))
    refused(lambda card, stream, x, event: card.lib.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(4)))
    refused(lambda card, stream, x, event: card.lib.cuMemFree_v2(x))
    refused(lambda card, stream, x, event: card.lib.cuModuleLoadData(C.byref(C.c_void_p()), b"//\n"))
    refused(lambda card, stream, x, event: card.lib.cuMemFreeAsync(x, stream), 1)  # not the graph's own memory
    refused(lambda card, stream, x, event: card.lib.cuStreamWaitEvent(stream, event, 0), 905)
    card = Card()
    assert card.begin(C.c_void_p(0)) == 900, "the legacy stream"
    assert card.end()[0] == 401 and card.begin() == 0 and card.begin() == 401


def relaxed():
    card, mode = Card(), integer(2)
    assert card.begin() == 0
    assert card.lib.cuThreadExchangeStreamCaptureMode(C.byref(mode)) == 0 and mode.value == 0
    assert card.lib.cuMemAlloc_v2(C.byref(C.c_uint64()), C.c_size_t(4)) == 0
    assert card.lib.cuThreadExchangeStreamCaptureMode(C.byref(mode)) == 0 and mode.value == 2
    assert card.end()[0] == 0


def forked():
    card = Card()
    one, two, out, back = card.stream(), card.stream(), card.event(), card.event()
    x = card.put_floats([1], one)
    for joins in [False, True]:
        assert card.begin(one) == 0
        assert card.lib.cuEventRecord(out, one) == 0 and card.lib.cuStreamWaitEvent(two, out, 0) == 0
        assert card.affine(x, x, 1, 2, 1, two) == 0
        assert card.lib.cuEventSynchronize(out) == 907
        if joins:
            assert card.lib.cuEventRecord(back, two) == 0 and card.lib.cuStreamWaitEvent(one, back, 0) == 0
        status, graph = card.end(one)
        assert status == (0 if joins else 904)
    assert card.lib.cuGraphLaunch(card.program(graph), one) == 0
    assert card.get(x, 1, one) == [3]


def memory_of_a_graph():  # SIM_MEMORY
    card, free, total = Card(), C.c_size_t(), C.c_size_t()

    def bytes_free():
        card.lib.cuMemGetInfo_v2(C.byref(free), C.byref(total))
        return free.value

    card.begin()
    for _ in range(3):  # one after the other in the same place
        card.lib.cuMemFreeAsync(card.alloc(1024), OWN)
    left = card.alloc(1024)
    assert card.alloc(4096) is None
    status, graph = card.end()
    assert status == 0 and bytes_free() == 4096
    program, own = card.program(graph), card.program(graph, 1)
    assert card.lib.cuGraphLaunch(program, OWN) == 0 and bytes_free() == 3072
    assert card.lib.cuGraphLaunch(program, OWN) == 1, "what the first launch left is still there"
    assert card.lib.cuMemFreeAsync(left, OWN) == 0 and card.lib.cuGraphLaunch(program, OWN) == 0
    assert card.lib.cuGraphLaunch(own, OWN) == 0, "frees what is left by itself"


def memory_that_a_graph_freed():
    card = Card()
    card.begin()
    gone = card.alloc(4)
    card.lib.cuMemFreeAsync(gone, OWN)
    card.lib.cuGraphLaunch(card.program(card.end()[1]), OWN)
    card.get(gone, 1)


# ---- failures on demand: every kind of call, by the name that SIM_FAULT has for it


def one_of_everything():
    """Calls each kind once; prints the names and statuses of those that did not answer 0."""
    card = Card.__new__(Card)
    card.lib, card.functions, card.device = C.CDLL(f"{OUT}/libcuda.so.1"), {}, 0
    cublas, cudnn = C.CDLL(f"{OUT}/libcublas.so.13"), C.CDLL(f"{OUT}/libcudnn.so.9")
    lib, handle, p, room = card.lib, C.c_void_p(), C.c_uint64(), (C.c_float * 4)()
    four, context, module, function = C.c_size_t(16), C.c_void_p(), C.c_void_p(), C.c_void_p()

    def tell(name, status):
        if status:
            print(name, status)

    tell("cuInit", lib.cuInit(0))
    tell("cuDevicePrimaryCtxRetain", lib.cuDevicePrimaryCtxRetain(C.byref(context), 0))
    lib.cuCtxSetCurrent(C.c_void_p(0x1000))
    tell("cuMemGetInfo", lib.cuMemGetInfo_v2(C.byref(C.c_size_t()), C.byref(C.c_size_t())))
    stream = C.c_void_p()
    tell("cuStreamCreate", lib.cuStreamCreate(C.byref(stream), 1))
    stream = OWN
    card.begin = lambda: lib.cuStreamBeginCapture_v2(stream, 0)
    tell("cuMemAlloc", lib.cuMemAllocAsync(C.byref(p), four, stream))
    q = card.alloc(16)
    p = p if p.value else q
    tell("cuMemcpyHtoD", lib.cuMemcpyHtoDAsync_v2(p, bytes(16), four, stream))
    tell("cuMemcpyDtoD", lib.cuMemcpyDtoDAsync_v2(q, p, four, stream))
    tell("cuMemsetD8", lib.cuMemsetD8Async(q, 0, four, stream))
    tell("cuMemcpyDtoH", lib.cuMemcpyDtoHAsync_v2(room, q, four, stream))
    text = b"//\n.version 8.0\n.entry ucopy_f32(.param .b8 p, .param .b8 p, .param .b8 p, .param .b8 p, .param .b8 p)\n"
    tell("cuModuleLoadData", lib.cuModuleLoadData(C.byref(module), text))
    if not module.value:
        lib.cuModuleLoadData(C.byref(module), text)
    tell("cuModuleGetFunction", lib.cuModuleGetFunction(C.byref(function), module, b"ucopy_f32"))
    if not function.value:
        lib.cuModuleGetFunction(C.byref(function), module, b"ucopy_f32")
    tell("cuFuncSetAttribute", lib.cuFuncSetAttribute(function, 8, 1024))
    card.functions["ucopy_f32"] = function
    tell("cuLaunchKernel", card.copy(p, q, 4))
    event = C.c_void_p()
    tell("cuEventCreate", lib.cuEventCreate(C.byref(event), 0))
    event = event if event.value else card.event()
    tell("cuEventRecord", lib.cuEventRecord(event, stream))
    tell("cuStreamWaitEvent", lib.cuStreamWaitEvent(stream, event, 0))
    tell("cuEventSynchronize", lib.cuEventSynchronize(event))
    tell("cuStreamSynchronize", lib.cuStreamSynchronize(stream))
    tell("cuCtxSynchronize", lib.cuCtxSynchronize())
    host = C.c_void_p()
    tell("cuMemHostAlloc", lib.cuMemHostAlloc(C.byref(host), four, 0))
    tell("cublasCreate", cublas.cublasCreate_v2(C.byref(handle)))
    if not handle.value:
        cublas.cublasCreate_v2(C.byref(handle))
    cublas.cublasSetStream_v2(handle, stream)
    tell("cublasGemmStridedBatchedEx", multiply(cublas, handle, p, p, q))
    tell("cudnnCreate", cudnn.cudnnCreate(C.byref(C.c_void_p())))
    tell("cuStreamBeginCapture", card.begin())
    if card.begin() == 0:  # the first one failed
        card.end()
        card.begin()
    status, graph = card.end()
    tell("cuStreamEndCapture", status)
    if status:
        card.begin()
        graph = card.end()[1]
    program = C.c_void_p()
    tell("cuGraphInstantiate", lib.cuGraphInstantiateWithFlags(C.byref(program), graph, C.c_ulonglong(0)))
    program = program if program.value else card.program(graph)
    tell("cuGraphLaunch", lib.cuGraphLaunch(program, stream))
    tell("cuMemFree", lib.cuMemFreeAsync(p, stream))


FAULTS = """
cuInit cuDevicePrimaryCtxRetain cuMemGetInfo cuStreamCreate cuMemAlloc cuMemcpyHtoD cuMemcpyDtoD cuMemsetD8 cuMemcpyDtoH cuModuleLoadData
cuModuleGetFunction cuFuncSetAttribute cuLaunchKernel cuEventCreate cuEventRecord cuStreamWaitEvent cuEventSynchronize cuStreamSynchronize
cuCtxSynchronize cuMemHostAlloc cublasCreate cublasGemmStridedBatchedEx cudnnCreate cuStreamBeginCapture cuStreamEndCapture cuGraphInstantiate
cuGraphLaunch cuMemFree
""".split()

STRICT, GUARD = {"SIM_STRICT": "1"}, {"SIM_GUARD": "1"}
# (case, what is to be seen: nothing, a word, or an exit status; settings)
CASES = [
    (sums, None, {}),
    (half_warp, "does not take part", {}),
    (a_barrier, None, {}),
    (a_barrier, None, {"SIM_REVERSE": "1"}),
    (a_barrier_that_is_not_there, None, {}),
    (a_barrier_that_is_not_there, None, {"SIM_REVERSE": "1"}),
    (too_many_threads, None, {}),
    (shared_memory_that_was_not_asked_for, None, {}),
    (a_newer_ptx, None, {"SIM_DRIVER": "12040"}),
    (freed, "no live device memory", {}),
    (freed_twice, "no live device memory", {}),
    (overrun, -11, GUARD),
    (no_overrun, None, GUARD),
    (a_copy_too_long, "100 too many", {}),
    (full, None, {"SIM_MEMORY": "2000"}),
    (unwritten, None, {}),
    (the_other_card, "lies on device 1, the call is on 0", {"SIM_DEVICES": "2"}),
    (two_cards, None, {"SIM_DEVICES": "2"}),
    (two_streams, "nothing awaited", STRICT),
    (awaited, None, STRICT),
    (after_its_event, None, STRICT),
    (after_an_event_too_early, "nothing awaited", STRICT),
    (through_a_third_stream, None, STRICT),
    (a_free_on_another_stream, "nothing awaited", STRICT),
    (a_library_on_another_stream, "nothing awaited", STRICT),
    (a_stream_that_is_gone, "no more, there", {}),
    (clock, None, {}),
    (replay, None, STRICT),
    (counts_of_a_replay, None, {}),
    (refused_while_capturing, None, {}),
    (relaxed, None, {}),
    (forked, None, {}),
    (memory_of_a_graph, None, {"SIM_MEMORY": "4096"}),
    (memory_that_a_graph_freed, "no live device memory", {}),
]


def run(name, settings):
    command = [sys.executable, __file__, OUT, name]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, **settings})


def seen(done, expected):
    if expected is None:
        return done.returncode == 0
    if isinstance(expected, int):
        return done.returncode == expected
    return done.returncode != 0 and expected in done.stderr


def main():
    results = []
    for case, expected, settings in CASES:
        done = run(case.__name__, settings)
        results.append((case.__name__, seen(done, expected), (done.returncode, done.stderr[-600:])))
    done = run("counts_of_a_replay", {"SIM_STATS": "1"})
    counted = dict(line[4:].rsplit(None, 2)[:2] for line in done.stderr.splitlines() if line.startswith("sim ") and line[-1].isdigit())
    right = counted.get("graph launch") == "5" and counted.get("kernel affine_f32") == "5"
    results.append(("a replay counts its nodes", right, counted))
    done = run("one_of_everything", {})
    results.append(("nothing fails that was not told to", done.returncode == 0 and not done.stdout, done.stdout + done.stderr))
    for name in FAULTS:
        done = run("one_of_everything", {"SIM_FAULT": f"{name}:77:1"})
        results.append((f"{name} fails once", done.returncode == 0 and done.stdout == f"{name} 77\n", done.stdout + done.stderr))
    for name, right, found in results:
        print("ok   " if right else "FAILS", name, "" if right else found)
    return any(not right for _, right, _ in results)


if len(sys.argv) > 2:
    globals()[sys.argv[2]]()
else:
    sys.exit(main())
