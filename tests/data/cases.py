"""The inputs of the parity tests: texts, seeds, step counts and the end-to-end cases."""

LONG = (
    "a very detailed photograph of an astronaut in an orange suit standing before a flag and a model of the space "
    "shuttle, studio light, sharp focus, 85mm lens, f/1.8, film grain, high dynamic range, award winning portrait, "
) * 3

PROMPTS = {"empty": "", "cat": "a photo of a cat", "long": LONG}

TOKENIZER_TEXTS = [
    "",
    " ",
    "a photo of a cat",
    "A Photo Of A CAT",
    "MiXeD cAsE wOrDs ÀÉÎÕÜ ẞ İstanbul ΣΊΣΥΦΟΣ",
    "café naïve façade Ångström piñata",
    "cafe\u0301 nai\u0308ve (combining marks)",
    "ﬁne ligatures ½ ² № ™",
    "emoji 😀👍🏽👨‍👩‍👧‍👦🇩🇪 ❤️ end",
    "I'm you're they've he'll she'd it's don't can't y'all'd've",
    "I'M YOU'RE 'S 'T O'Reilly rock'n'roll ''quoted''",
    "’curly’ “quotes” it’s",
    "0 1 12 123 1234567890 3.14 1,000,000 4k 8K 1080p",
    "٣٤ Ⅷ ①② ५",
    "  leading,   inner\t\ttabs\nnewlines\r\n\r\n and trailing   ",
    "non\u00a0breaking\u2003em\u3000ideographic\u200bzero-width\ufeff",
    "<|startoftext|>",
    "<|endoftext|>",
    "before <|endoftext|> after",
    "a<|startoftext|>b<|endoftext|>c",
    "<|ENDOFTEXT|> <|endoftext |> <|endoftext| >",
    "<b>bold</b> &amp; &lt;tag&gt; <!-- comment --> <a href=\"x\">y</a>",
    "(masterpiece:1.2), [ugly], {x|y}, --ar 16:9 :: #tag @user https://example.org/a_b?c=d",
    "!!! ??? ... --- ___ *** +++ === ~~~ ^^^ $$$ %%%",
    "snake_case kebab-case CamelCase UPPER_CASE v1.5-pruned.ckpt",
    "日本語のテキスト 中文字符 한국어 ไทย العربية עברית हिन्दी",
    "русский текст ελληνικά",
    "a\x00b\x01c\x7f control characters",
    "\U0001f468\u200d\U0001f680 𝒻𝒶𝓃𝒸𝓎 𠀀 rare planes",
    "supercalifragilisticexpialidocious pneumonoultramicroscopicsilicovolcanoconiosis",
    "x" * 200,
    "cat " * 74,
    "cat " * 75,
    "cat " * 76,
    "word, " * 60,
    LONG,
    "猫" * 90,
    "😀" * 40,
]

STEP_COUNTS = (1, 2, 3, 4, 5, 10, 20, 50, 1000)

NOISE_COUNTS = (1, 2, 15, 16, 17, 31, 32, 64, 100, 1000, 65536)
NOISE_SEEDS = (0, 33, 2**31 + 9, 2**32 + 5, 2**63)


def _case(name, input, steps=4, schedule="karras", guidance=1.0, prompt="a photo of a cat", negative=None, seed=0,
          weights="f32", image=False):
    return dict(name=name, input=input, steps=steps, schedule=schedule, guidance=guidance, prompt=prompt,
                negative_prompt=negative, seed=seed, weights=weights, image=image)


SQUARE, WIDE, LATENTS = "square-64x64.png", "wide-96x64.png", "latents-8x12.safetensors"
BLURRY = "blurry, low quality"

END_TO_END = [
    _case("square-karras-4", SQUARE, image=True),
    _case("square-log-linear-4", SQUARE, schedule="log-linear", image=True),
    _case("square-karras-1", SQUARE, steps=1),
    _case("square-log-linear-1", SQUARE, steps=1, schedule="log-linear"),
    _case("square-karras-20", SQUARE, steps=20, image=True),
    _case("square-log-linear-20", SQUARE, steps=20, schedule="log-linear"),
    _case("square-guidance-0", SQUARE, guidance=0.0),
    _case("square-guidance-0-log-linear", SQUARE, guidance=0.0, schedule="log-linear"),
    _case("square-guidance-0.5", SQUARE, guidance=0.5),
    _case("square-empty-prompt", SQUARE, prompt=""),
    _case("square-long-prompt", SQUARE, prompt=LONG, seed=2**63),
    _case("square-seed-2^32+5", SQUARE, seed=2**32 + 5),
    _case("wide-guided-karras-4", WIDE, guidance=7.5, negative=BLURRY, seed=33, image=True),
    _case("wide-guided-log-linear-4", WIDE, guidance=7.5, negative=BLURRY, seed=33, schedule="log-linear"),
    _case("wide-guided-no-negative", WIDE, guidance=3.0, seed=33),
    _case("wide-guided-karras-20", WIDE, guidance=7.5, negative=BLURRY, seed=33, steps=20),
    _case("latents-karras-4", LATENTS, image=True),
    _case("latents-log-linear-4", LATENTS, schedule="log-linear"),
    _case("latents-guided-karras-4", LATENTS, guidance=2.0, negative=BLURRY, seed=5),
    _case("square-karras-4-f16-weights", SQUARE, weights="f16"),
    _case("wide-guided-karras-4-f16-weights", WIDE, guidance=7.5, negative=BLURRY, seed=33, weights="f16"),
    _case("square-karras-4-bf16-weights", SQUARE, weights="bf16"),
    _case("wide-guided-karras-4-bf16-weights", WIDE, guidance=7.5, negative=BLURRY, seed=33, weights="bf16"),
]

# Those that are done again with an AutoencoderTiny in the VAE's place.
TAESD_CASES = ("square-karras-4", "wide-guided-karras-4", "latents-karras-4")
