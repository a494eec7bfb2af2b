"""What the published configuration may cost on the card: lower a number where the program got better, never raise one
without a reason beside it. test_card.py holds them; `report.py` prints what is.

float16, guidance 1, a prompt. A call is a kernel or a library's call. Counts are exact, so a ceiling is what was counted.
"""

# A stage of 512 -> 1024, with the weights that it reads; `moved` is in bytes, as report.py counts them. One step of the UNet:
# (Of it one call and one allocation round the time embedding, which is float32: bfloat16 came a quarter nearer by it.)
STEP = dict(calls=381, uploads=0, allocations=248, memsets=0, syncs=0, moved=3_630_000_000)
# What is done once:
# Of it two calls, four allocations, two memsets and two syncs try the card: at its opening, and, as it computes nothing, at each first use.
# One of its uploads is the features of the noise level, a row a picture.
TEXT = dict(calls=152, uploads=520, allocations=675, memsets=3, syncs=4)  # zeros that every norm leaves as they are
ENCODE = dict(calls=82, uploads=109, allocations=156, memsets=0, syncs=2)
DECODE = dict(calls=106, uploads=141, allocations=200, memsets=0, syncs=1)

# Stable Diffusion 1.4 as the base checkpoint, 64x64 latents, float16, both prompts of guidance in one batch: what is done once (two prompts,
# of which the keys and values of every cross-attention, and what every step's time adds to a resnet), and one step of PNDM.
BASE = dict(calls=271, uploads=768, allocations=1038, memsets=0, syncs=3)
BASE_STEP = dict(calls=439, uploads=0, downloads=0, allocations=343, memsets=0, syncs=0, moved=5_810_000_000)
# Bytes of device memory at most, from words to 1024x1024, without and with the refining pass.
BASE_PEAK, REFINED_PEAK = 1_904_057_856, 2_585_404_928

# Bytes of device memory at most, by the side of the image that is upscaled.
PEAK = {512: 1_311_439_872, 1024: 4_935_318_528}

# Runs of half precision that overflow and are done again in float32, of those that test_card.py compares.
RETRIED = 0
