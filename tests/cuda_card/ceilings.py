"""What the published configuration may cost on the card: lower a number where the program got better, never raise one
without a reason beside it. test_card.py holds them; `report.py` prints what is.

float16, guidance 1, a prompt. A call is a kernel or a library's call. Counts are exact, so a ceiling is what was counted.
"""

# A stage of 512 -> 1024, with the weights that it reads; `moved` is in bytes, as report.py counts them. One step of the UNet:
STEP = dict(calls=2636, uploads=1010, allocations=3682, memsets=71, syncs=0, moved=16_600_000_000)
# What is done once:
TEXT = dict(calls=491, uploads=949, allocations=1438, memsets=0, syncs=2)
ENCODE = dict(calls=358, uploads=277, allocations=663, memsets=34, syncs=2)
DECODE = dict(calls=478, uploads=368, allocations=879, memsets=36, syncs=1)

# Bytes of device memory at most, by the side of the image that is upscaled.
PEAK = {512: 5_566_792_192, 1024: 21_672_919_552}

# Runs of half precision that overflow and are done again in float32, of those that test_card.py compares.
RETRIED = 1
