"""The program on the card of build.sh: right numbers, failures in words, and what it may cost.

    python3 tests/cuda_card/test_card.py OUT PROGRAM [NAME ...]

PROGRAM is built with `--features cuda,cudnn` after `.ci/cuda/prepare.sh --card`. NAMEs are tests to run alone.
"""

import collections
import concurrent.futures
import os
import pathlib
import shutil
import sys
import tempfile
import unittest
import unittest.mock

sys.dont_write_bytecode = True
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import ceilings  # noqa: E402
import published  # noqa: E402
from card import DATA, Card, base_arguments, base_stages, read_bmp, read_tensors, relative_error, stages, write_latents, write_png  # noqa: E402

SMALL, SQUARE = DATA / "model", DATA / "inputs" / "square-64x64.png"
card = None  # set by main
# As tests/parity/card.rs: what float32's order of sums leaves, and what the roundings of the halves leave.
LATENTS = {"f32": 1e-5, "f16": 5e-3, "bf16": 4e-2}
# The same of more steps with guidance of 3, which multiplies them: three times what is seen.
BASE_LATENTS = {"f32": 1e-4, "f16": 2e-2, "bf16": 1.3e-1}


def in_parallel(work, items):
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(work, items))


class CardTest(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp())
        self.addCleanup(shutil.rmtree, self.folder)

    def upscale(self, name, *arguments, device="cuda", model=SMALL, steps=2, input=SQUARE, dtype="f32", **settings):
        """A quiet run on one input; answers it and the path it was to write, in a folder of its own."""
        out = self.folder / pathlib.Path(name).stem / name
        out.parent.mkdir()
        run = card.run(input, "--model", model, "-s", steps, "--dtype", dtype, "--device", device, "-q", "-o", out, *arguments, **settings)
        return run, out

    def done(self, run):
        self.assertEqual(run.status, 0, run)
        return run

    def assert_refused(self, run, out, what):
        """One line, exit status 1, nothing written."""
        self.assertEqual(run.status, 1, f"{what}: {run}")
        self.assertEqual(len(run.told), 1, f"{what}: {run}")
        self.assertEqual(list(out.parent.iterdir()), [], f"{what}: something was written")

    def assert_picture(self, out, expected, what, levels=1):
        """float32 on either device: a level flips where a value lay on the edge of rounding."""
        (ours, size), (theirs, their_size) = read_bmp(out), read_bmp(expected)
        self.assertEqual(size, their_size, what)
        worst = max(abs(a - b) for a, b in zip(ours, theirs))
        self.assertLessEqual(worst, levels, f"{what}: levels are off by {worst}")


class Numbers(CardTest):
    def test_latents_are_those_of_the_cpu(self):
        retried = 0
        for model in ["tiny", SMALL]:
            run, cpu = self.upscale(f"{pathlib.Path(model).name}.safetensors", device="cpu", model=model)
            self.done(run)
            reference = read_tensors(cpu)
            for dtype, tolerance in LATENTS.items():
                what = f"{pathlib.Path(model).name} in {dtype}"
                out = self.folder / f"{dtype}.safetensors"
                run = card.run(SQUARE, "--model", model, "-s", 2, "--dtype", dtype, "--device", "cuda", "-o", out)
                self.done(run)
                retried += any("float32" in line for line in run.told)
                (ours,), (theirs,) = read_tensors(out).values(), reference.values()
                error = relative_error(ours, theirs)
                print(f"{what}: relative error {error:.1e}")
                self.assertLessEqual(error, tolerance, what)
        self.assertLessEqual(retried, ceilings.RETRIED, "runs done again in float32")

    def test_nothing_is_read_or_written_past_its_end(self):
        for dtype in LATENTS:
            _, plain = self.upscale(f"plain-{dtype}.safetensors", dtype=dtype)
            run, guarded = self.upscale(f"guarded-{dtype}.safetensors", dtype=dtype, guard=1)
            self.done(run)
            self.assertEqual(read_tensors(plain), read_tensors(guarded), dtype)

    def test_threads_wait_for_each_other(self):
        for dtype in LATENTS:
            _, forwards = self.upscale(f"forwards-{dtype}.safetensors", dtype=dtype)
            run, backwards = self.upscale(f"backwards-{dtype}.safetensors", dtype=dtype, reverse=1)
            self.done(run)
            self.assertEqual(read_tensors(forwards), read_tensors(backwards), f"{dtype}: the order of threads changes the numbers")

    def test_streams_wait_for_each_other(self):
        shutil.copy(SQUARE, self.folder / "a.png")
        shutil.copy(SQUARE, self.folder / "b.png")
        run = card.run(self.folder / "a.png", self.folder / "b.png", "--model", SMALL, "-s", 2, "--device", "cuda", "-q", "-o", self.folder / "out", strict=1)
        self.done(run)
        self.assertEqual(run.told, [])
        self.assertEqual(len(list((self.folder / "out").iterdir())), 2)

    def test_every_sampler_gives_the_latents_of_the_cpu_and_reads_nothing_back_in_a_step(self):
        noisy = ["euler-ancestral", "dpm2-ancestral", "dpmpp-2s-ancestral", "dpm-fast"]
        fixed = [*noisy, "euler", "heun", "dpm2", "dpmpp-2m"]
        for dtype in LATENTS:  # the card is tried at its first use, which is counted too
            self.done(self.upscale(f"first-{dtype}.safetensors", dtype=dtype)[0])

        def at(case):
            sampler, dtype = case
            settings = ["--sampler", sampler, "-g", 2] + (["--tolerance", 5] if sampler == "dpm-adaptive" else [])
            run, cpu = self.upscale(f"cpu-{sampler}-{dtype}.safetensors", *settings, device="cpu", steps=3)
            self.done(run)
            run, few = self.upscale(f"few-{sampler}-{dtype}.safetensors", *settings, dtype=dtype, steps=3, strict=1, stats=1)
            self.assertEqual(self.done(run).told, [], case)
            more = self.upscale(f"more-{sampler}-{dtype}.safetensors", *settings, dtype=dtype, steps=6, stats=1)[0]
            return case, cpu, few, run.summary(), self.done(more).summary()

        # What the adaptive one's are decides its steps.
        cases = [(sampler, dtype) for sampler in fixed for dtype in LATENTS] + [("dpm-adaptive", "f32")]
        for (sampler, dtype), cpu, few, counts, more in in_parallel(at, cases):
            what = f"{sampler} in {dtype}"
            (ours,), (theirs,) = read_tensors(few).values(), read_tensors(cpu).values()
            error = relative_error(ours, theirs)
            print(f"{what}: relative error {error:.1e}")
            self.assertLessEqual(error, LATENTS[dtype], what)
            if sampler in fixed:
                self.assertEqual(more["downloads"], counts["downloads"], f"{what}: steps read something back")
                # Three steps more: their noise, and nothing else.
                most = 3 if sampler in noisy else 0
                self.assertLessEqual(more["uploads"] - counts["uploads"], most, f"{what}: steps send something")

    def words(self, name, *arguments, model="sd1", device="cuda", dtype="f32", steps=4, **settings):
        """A quiet run from words alone to latents, with both prompts of guidance in a batch, and through the refining pass."""
        out = self.folder / f"{name}.safetensors"
        base = ["--generate", "--base", DATA / "base" / model, "--base-steps", steps, "--base-guidance", 3, "--size", "64x64", "-p", "a cat", "--refine", 0.5]
        run = card.run(*base, "--model", SMALL, "-s", 1, "--dtype", dtype, "--device", device, "-q", "-o", out, *arguments, **settings)
        return self.done(run), out

    def test_a_base_checkpoint_gives_the_latents_of_the_cpu_and_reads_nothing_back_in_a_step(self):
        models = ["sd1", "sd2"]
        cpu = {model: self.words(f"cpu-{model}", model=model, device="cpu")[1] for model in models}
        for dtype in LATENTS:  # the card is tried at its first use, which is counted too
            self.done(self.upscale(f"first-{dtype}.safetensors", dtype=dtype)[0])

        def at(case):
            model, dtype = case
            run, few = self.words(f"few-{model}-{dtype}", model=model, dtype=dtype, guard=1, strict=1, stats=1)
            self.assertEqual(run.told, [], case)
            return case, few, run.summary()

        cases = [(model, dtype) for model in models for dtype in LATENTS]
        for (model, dtype), few, counts in in_parallel(at, cases):
            what = f"{model} in {dtype}"
            (ours,), (theirs,) = read_tensors(few).values(), read_tensors(cpu[model]).values()
            error = relative_error(ours, theirs)
            print(f"{what}: relative error {error:.1e}")
            self.assertLessEqual(error, BASE_LATENTS[dtype], what)
            if dtype == "f16":  # one type's calls are those of all
                more = self.words(f"more-{model}", model=model, dtype=dtype, steps=6, stats=1)[0].summary()
                self.assertEqual(more["downloads"], counts["downloads"], f"{what}: steps read something back")
                self.assertEqual(more["uploads"], counts["uploads"], f"{what}: steps send something")

    def test_latents_stay_on_the_card_from_the_base_checkpoint_to_the_refining_pass(self):
        def bytes_read(run):
            return sum(n for name, n in run.bytes.items() if name.startswith("copy from the card"))

        def read_back(name, *arguments):
            return bytes_read(self.words(name, *arguments, dtype="f16", steps=2, stats=1)[0])

        self.done(self.upscale("first.safetensors", steps=1, dtype="f16")[0])  # tries the card
        latents = self.folder / "latents.safetensors"
        write_latents(latents, 8)
        upscaled, _ = self.upscale("upscaled.safetensors", input=latents, steps=1, dtype="f16", stats=1)
        # What a run that is given latents reads back, and beside that the contexts of two prompts, 77 tokens of 48 numbers, and of what was
        # made, upscaled and refined whether it is numbers.
        once = bytes_read(self.done(upscaled)) + 2 * 77 * 48 * 4 + 3 * 4
        self.assertEqual(read_back("once"), once)
        # Of another pass the result, four times as large, and the same of what it was made of.
        self.assertEqual(read_back("twice", "--scale", 4), once + 3 * 4 * 16 * 16 * 4 + 4)

    def test_a_folder_over_two_cards(self):
        inputs, names = self.folder / "in", [f"{i}.png" for i in range(4)]
        inputs.mkdir()
        for i, name in enumerate(names):
            write_png(inputs / name, 32 + 8 * i)
        runs = {}
        for cards, device in [(1, "cuda"), (2, "cuda:all")]:
            out = self.folder / str(cards)
            runs[cards] = card.run(inputs, "--model", SMALL, "-s", 2, "--dtype", "f32", "--device", device, "-q", "--format", "bmp", "-o", out, devices=cards, strict=1, stats=1)
            self.done(runs[cards])
            self.assertEqual(runs[cards].told, [])
        self.assertTrue(all(peak > 0 for peak in runs[2].peaks) and len(runs[2].peaks) == 2, runs[2].peaks)
        for name in names:
            written = [next((self.folder / str(cards)).glob(f"{pathlib.Path(name).stem}*.bmp")) for cards in runs]
            self.assertEqual(written[0].read_bytes(), written[1].read_bytes(), name)


class Failures(CardTest):
    def reference(self, dtype="f32", model=SMALL):
        """What a run writes that nothing disturbs, and its counts."""
        run, out = self.upscale(f"reference-{dtype}.bmp", dtype=dtype, model=model, stats=1)
        self.done(run)
        return run, out

    def test_too_little_memory_is_told_or_coped_with(self):
        # In float16 a run may go on where there is memory, on the CPU or in another order: off by that type's roundings, of which
        # the built-in model, which was trained, makes a level or two. One of random weights makes a hundred.
        for dtype, model, parts, levels in [("f32", SMALL, 24, 1), ("f16", "tiny", 10, 3)]:
            run, expected = self.reference(dtype, model)
            peak = run.peaks[0]
            sizes = [0, 1 << 16, *(peak * i // parts for i in range(1, parts)), peak - 512, peak, peak + 512]

            def at(size):
                return size, *self.upscale(f"{dtype}-{size}.bmp", dtype=dtype, model=model, memory=size)

            managed = 0
            for size, run, out in in_parallel(at, sizes):
                what = f"{dtype}, {size} of {peak} bytes"
                if run.status == 0:
                    self.assert_picture(out, expected, what, levels)
                    managed += 1
                else:
                    self.assert_refused(run, out, what)
                    self.assertRegex(run.told[0], "memory", what)
            print(f"{dtype}: {managed} of {len(sizes)} sizes up to {peak} bytes gave the picture")
            self.assertGreaterEqual(managed, 2, "with as much as it needs a run must do")

    def test_less_memory_than_whole_maps_take_gives_the_same_picture_on_the_card(self):
        picture = self.folder / "photo.png"
        write_png(picture, 256)
        whole, expected = self.upscale("whole.bmp", input=picture, steps=1, stats=1)
        self.done(whole)
        peak = whole.peaks[0]
        # The maps of the decoder's last level are 17 and 25 MB each, and are kept in bands of 16 or 4 MiB.
        for share in [0.75, 0.6]:
            most = int(share * peak)
            run, out = self.upscale(f"bands-{share}.bmp", "--max-memory", most, input=picture, steps=1, stats=1)
            self.done(run)
            self.assertEqual(run.told, [], "it was to be done on the card")
            print(f"within {most} bytes of the card's: {run.peaks[0]}, {peak} without")
            self.assertLess(run.peaks[0], peak)
            self.assert_picture(out, expected, f"within {share} of {peak} bytes")

    # Statuses: CUDA_ERROR_ILLEGAL_ADDRESS, CUBLAS_STATUS_EXECUTION_FAILED, CUDNN_STATUS_EXECUTION_FAILED.
    KINDS = {
        "cuInit": 999, "cuDevicePrimaryCtxRetain": 999, "cuStreamCreate": 999, "cuEventCreate": 999, "cuEventRecord": 999, "cuStreamWaitEvent": 999,
        "cuMemAlloc": 700, "cuMemFree": 700, "cuMemcpyHtoD": 700, "cuMemcpyDtoH": 700, "cuMemcpyDtoD": 700, "cuMemsetD8": 700, "cuMemHostAlloc": 999,
        "cuStreamSynchronize": 700, "cuCtxSynchronize": 700, "cuEventSynchronize": 700, "cuModuleLoadData": 209, "cuModuleGetFunction": 500,
        "cuFuncSetAttribute": 1, "cuLaunchKernel": 700, "cuStreamBeginCapture": 900, "cuStreamEndCapture": 901, "cuGraphInstantiate": 999,
        "cuGraphLaunch": 700, "cublasCreate": 13, "cublasGemmStridedBatchedEx": 13, "cublasLtCreate": 13, "cublasLtMatmul": 13, "cudnnCreate": 5000,
        "cudnnConvolutionForward": 5000, "cudnnConvolutionBiasActivationForward": 5000,
    }  # fmt: skip
    # What a run may survive, if its picture is right: memory that is not given back, and what has another way.
    SURVIVED = {
        "cuMemFree", "cuMemsetD8", "cuModuleGetFunction", "cuFuncSetAttribute", "cudnnConvolutionForward", "cudnnConvolutionBiasActivationForward",
        "cublasLtCreate", "cublasLtMatmul", "cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphInstantiate", "cuMemHostAlloc",
    }  # fmt: skip

    def test_a_failing_call_ends_in_one_line(self):
        _, expected = self.reference()

        def at(case):
            kind, nth = case
            return case, *self.upscale(f"{kind}-{nth}.bmp", fault=f"{kind}:{self.KINDS[kind]}:{nth}")

        cases = [(kind, nth) for kind in self.KINDS for nth in [1, 2, 3, 50, 400]]
        refused = collections.Counter()
        for (kind, nth), run, out in in_parallel(at, cases):
            what = f"call {nth} of {kind} fails"
            if run.status == 0:  # it came to no such call, or it has another way
                self.assert_picture(out, expected, what)
            else:
                self.assert_refused(run, out, what)
                refused[kind] += 1
        print("failing calls that were told of:", dict(refused))
        must = {"cuInit", "cuDevicePrimaryCtxRetain", "cuMemAlloc", "cuMemcpyHtoD", "cuMemcpyDtoH", "cuModuleLoadData", "cuLaunchKernel", "cublasCreate"}
        self.assertEqual(must - set(refused), set(), "failures of these were not seen")

    def test_auto_takes_the_cpu_where_the_card_cannot_be_used(self):
        _, expected = self.reference()
        out = self.folder / "auto.bmp"
        run = card.run(SQUARE, "--model", SMALL, "-s", 2, "--dtype", "f32", "--device", "auto", "-o", out, fault="cuInit:100:1")
        self.done(run)
        self.assertEqual(len([line for line in run.told if "running on the CPU" in line]), 1, run)
        self.assert_picture(out, expected, "on the CPU")


class OldCards(CardTest):
    def test_a_card_before_bfloat16(self):
        _, expected = self.upscale("cpu.bmp", device="cpu", model="tiny")
        run, out = self.upscale("f16.bmp", model="tiny", dtype="f16", capability=75)
        self.done(run)
        self.assert_picture(out, expected, "float16 on a card of 7.5", levels=3)
        out = self.folder / "bf16.bmp"
        run = card.run(SQUARE, "--model", "tiny", "--dtype", "bf16", "--device", "cuda", "-o", out, capability=75)
        self.assertEqual((run.status, len(run.told)), (2, 1), run)
        self.assertIn("--dtype bf16 needs a card of compute capability 8.0", run.told[0])
        self.assertFalse(out.exists())

    def test_a_card_that_no_kernel_is_for(self):
        run, out = self.upscale("old.bmp", capability=70)
        self.assert_refused(run, out, "capability 7.0")
        self.assertIn("7.5 or newer is needed", run.told[0])

    def test_a_driver_older_than_the_build(self):
        run, out = self.upscale("old.bmp", driver=12040)
        self.assert_refused(run, out, "an old driver")
        self.assertIn("update the driver", run.told[0])


class FirstUse(CardTest):
    """Of a card that no earlier run has found right."""

    def setUp(self):
        super().setUp()
        cache = unittest.mock.patch.dict(os.environ, XDG_CACHE_HOME=str(self.folder / "cache"))
        cache.start()
        self.addCleanup(cache.stop)

    def run_once(self, name, **settings):
        out = self.folder / name
        run = card.run(SQUARE, "--model", SMALL, "-s", 2, "--dtype", "f32", "--device", "cuda", "-o", out, stats=1, **settings)
        return self.done(run), out

    def test_a_layer_that_fails_is_done_without_and_the_card_is_tried_again(self):
        _, expected = self.run_once("expected.bmp")
        shutil.rmtree(self.folder / "cache")
        for _ in range(2):
            run, out = self.run_once("stock.bmp", fault="cublasLtMatmul:13:1")
            told = [line for line in run.told if "candle's own operations are used" in line]
            self.assertEqual(len(told), 1, run)
            self.assertRegex(told[0], "cuda:0 .*convolution 1x1, 8 -> 32, 9x9 in f32", run)
            self.assert_picture(out, expected, "candle's operations")
            self.assertEqual(list((self.folder / "cache").rglob("*.*")), [], "the card counts as right")

    def test_a_card_that_was_right_is_not_tried_again(self):
        first, _ = self.run_once("first.bmp")
        second, _ = self.run_once("second.bmp")
        self.assertFalse([line for line in first.told + second.told if "does not compute" in line])
        self.assertLess(second.summary()["calls"], first.summary()["calls"])

    def test_a_card_that_computes_nothing_is_said_to_be_so(self):
        run, _ = self.run_once("nothing.safetensors", skip=1)
        self.assertTrue([line for line in run.told if "0 + 1 is not 1" in line], run)


class Costs(CardTest):
    """The published configuration, computing nothing: counts, which do not depend on the numbers."""

    def setUp(self):
        super().setUp()
        self.model = self.folder / "published"
        published.main(self.model)

    def assert_within(self, what, counted, most):
        print(f"{what}: {counted}")
        over = {name: f"{counted[name]}, at most {ceiling}" for name, ceiling in most.items() if counted[name] > ceiling}
        self.assertEqual(over, {}, f"{what} costs more than tests/cuda_card/ceilings.py allows")

    def test_calls_copies_allocations_and_bytes(self):
        parts = stages(card, self.model, 512, self.folder)
        for name, most in [("text", ceilings.TEXT), ("encode", ceilings.ENCODE), ("step", ceilings.STEP), ("decode", ceilings.DECODE)]:
            with self.subTest(name):
                self.assert_within(name, parts[name].counts, most)
        self.assert_within("512 to 1024", {"peak": parts["decode"].peak}, {"peak": ceilings.PEAK[512]})

    def test_what_the_base_checkpoint_costs(self):
        base = self.folder / "base"
        published.base(base)
        parts = base_stages(card, self.model, base, 512, self.folder)
        for name, most in [("base", ceilings.BASE), ("base step", ceilings.BASE_STEP)]:
            with self.subTest(name):
                self.assert_within(name, parts[name].counts, most)
        # A picture, and one that is refined and whose low-res one is decoded too, on a card of 6 GB.
        arguments = [*base_arguments(base, 512, 4), "--model", self.model, "-o", self.folder / "a.png"]
        for what, more, most in [("from words", [], ceilings.BASE_PEAK), ("refined", ["--refine", 0.5, "--save-low-res"], ceilings.REFINED_PEAK)]:
            with self.subTest(what):
                run = self.done(card.run(*arguments, *more, skip=1, stats=1, memory=6_000_000_000))
                self.assertFalse([line for line in run.told if "CPU" in line or "memory" in line], run)
                self.assert_within(f"{what}, 512 to 1024", {"peak": run.peaks[0]}, {"peak": most})

    def test_bytes_of_a_larger_image(self):
        arguments = ["--model", self.model, "-s", 1, "--device", "cuda", "-q", "-o", self.folder / "a.png"]
        write_png(self.folder / "image.png", 1024)
        run = self.done(card.run(self.folder / "image.png", *arguments, skip=1, stats=1, memory=80 << 30))
        self.assert_within("1024 to 2048", {"peak": run.peaks[0]}, {"peak": ceilings.PEAK[1024]})

    def test_a_larger_image_within_the_memory_of_a_small_card(self):
        arguments = ["--model", self.model, "-s", 1, "--device", "cuda", "-q", "-o", self.folder / "a.png"]
        write_png(self.folder / "image.png", 1024)
        for most in [3 << 30, 2 << 30]:
            run = self.done(card.run(self.folder / "image.png", *arguments, skip=1, stats=1, memory=most))
            # That the card computes nothing is what is told of such a run, and nothing of the CPU.
            self.assertFalse([line for line in run.told if "CPU" in line], run)
            print(f"1024 to 2048 on a card of {most} bytes: {run.peaks[0]}")
            self.assertLessEqual(run.peaks[0], most)


if __name__ == "__main__":
    card = Card(*sys.argv[1:3])
    with tempfile.TemporaryDirectory() as cache:  # what a run remembers of the card is not the user's
        os.environ["XDG_CACHE_HOME"] = cache
        unittest.main(argv=[sys.argv[0], *(word for name in sys.argv[3:] for word in ["-k", name])], verbosity=2)
