"""transformers' tests that every tokenizer must pass (TokenizerTesterMixin), for the tokenizers of our checkpoints."""

import unittest

# What run.py unpacked.
from tests.test_tokenization_common import TokenizerTesterMixin

from steerling_hf import SteerlingTokenizer, checkpoint


class NanoTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = SteerlingTokenizer
    from_pretrained_id = str(checkpoint("steerling-nano"))
    test_rust_tokenizer = False


class ReleasedTest(TokenizerTesterMixin, unittest.TestCase):
    tokenizer_class = SteerlingTokenizer
    from_pretrained_id = str(checkpoint("steerling-8b-instruct"))
    test_rust_tokenizer = False
