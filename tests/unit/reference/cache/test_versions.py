"""What caches that exist rely on, pinned: their numbers, keys, identities and files.

A cache outlives the code that filled it. Where one of these tests fails, either the change is a mistake, or
the version it names must be raised (`SCORING` or `FORMAT` in `reference/identity.py`), which makes every run
score anew, and the new values are pinned under the new version.
"""

import base64
import zlib
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from fiducial.data.batch import Layout
from fiducial.data.tokenize import TokenizedGroup
from fiducial.model.scoring import Scorer
from fiducial.reference.cache.shards import Shard
from fiducial.reference.identity import FORMAT, SCORING, Identity
from fiducial.reference.sources import InitialPolicy
from tiny import FAMILIES, random_groups, tiny_model

SCORED = {
    1: {
        "llama": (-94.562, -125.905, -12.130, -44.190, -98.570, -73.951),
        "qwen2": (-90.491, -131.454, -12.627, -51.469, -98.506, -76.303),
        "qwen3": (-83.241, -136.515, -14.459, -47.264, -93.280, -75.395),
        "mistral": (-97.110, -121.066, -12.851, -41.733, -95.039, -72.615),
        "gemma2": (-92.923, -127.392, -14.538, -46.257, -97.818, -78.727),
        "gemma3_text": (-91.410, -130.630, -12.756, -49.324, -104.926, -82.329),
        "phi3": (-88.472, -122.493, -13.399, -42.002, -94.867, -78.767),
        "olmo2": (-84.792, -128.337, -11.253, -44.976, -93.951, -82.768),
        "gpt_neox": (-88.410, -127.343, -12.885, -42.084, -94.207, -75.505),
    },
}
"""By version of the scoring path and family: each completion's log-prob under the tiny model."""
IDENTITIES = {(1, 2): "e0f31b603d7b4b586dc3397ec4311080"}
"""By versions of scoring and format: what a folder of records is called."""
GROUP = TokenizedGroup(np.array([1, 2], np.int32), (np.array([3], np.int32), np.array([4, 5], np.int32)))
KEYS = {2: ("ce9bec23293f696040c115743966bd06", "74c7557a5320e2d0c6429cd403694c85")}
FILES = {
    2: (
        "c-rk%J4*vW5T47Om!OAUp<-ciqK#mqm5N{#OF>aY(85Su^@vH1<Scv?X#{I4K}!Wo!P-}$b|Mn2MJz1*0T$vpv%5(yi-KS$PT1Ss"
        "`R2Zv*_pizO-zhUcLM|{FB*UiB(+cvCe%O-S16iM)?4^Aq<)025ynCK7(NM$;krd)bvWjo99v{LmPs;>xeF}gyZ#z6)({U87&vxu"
        "-7DXF{0IVMj*#D0sRQl<Ai2zvsr+i1_77<1;A{un-f9flQ(TSG$4Yj|%j0~2b_2pzSGj3+eTKXy`Z4jxlZTZMw-e%~9LdJdrdTFV"
        "dV^#8K_zzQOMY=yF^KYfh>q-v;=KktbbcUxc)4ua^8v2WhHx7*qZp(7<ZW3W@oqRL9Y>0-fyl|=Tx3J_KGMYb0Iy%OthmJ)K{t2|"
        "+fb5P+*{?^ze}D7RHPoh7e|@D)5jG&UXD-5xPp%>ctXJw3hpVmr{DzzFNFH8BvB=A_`zQPC4Rg2+TJ<nCgPV(e&6D$>EBGPPdZO`"
        "*Tefo-5uTPx_T~d&JE0+C1+-4H%@lcJ;<KbL;ehTH%g*a#ZfpH11@OSe|X=2*5>yFyhlatE$kkXcZ@C1&*1mBBXmdJG{JT(=k2Pj"
        "{=X-G<$Gdd!w&KPl27T1xh4"
    ),
}
"""By version of the format: a whole file of records, compressed."""


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_scoring_path_gives_the_numbers_of_its_version(family: str, layout: Layout) -> None:
    scorer = Scorer(tiny_model(family), layout=layout)
    logps = InitialPolicy(scorer).token_logps(scorer.pack(random_groups(3, seed=11)))
    expected = torch.tensor(SCORED[SCORING][family])
    torch.testing.assert_close(
        logps.reduce().sum, expected, atol=2e-3, rtol=0, msg=lambda text: f"raise SCORING: {text}"
    )


def test_a_reference_is_called_what_it_was_called() -> None:
    identity = Identity("base", "0", "float32", "None")
    assert identity.digest == IDENTITIES[SCORING, FORMAT], "every cache would be lost"
    assert [each.name for each in fields(Identity)][-3:] == ["scoring", "format", "fingerprint"]


def test_completions_have_the_keys_they_had() -> None:
    assert GROUP.keys == KEYS[FORMAT], "no record would be found"


def test_a_file_that_was_written_in_this_format_is_read() -> None:
    content = zlib.decompress(base64.b85decode("".join(FILES[FORMAT])))
    shard = Shard.decode(pa.py_buffer(content), Path("a file"), "a reference")
    for row, (key, completion) in enumerate(zip(GROUP.keys, GROUP.completions, strict=True)):
        assert shard.keys[row].tobytes().hex() == key
        assert shard.values(row).tolist() == [-1.0, -2.0][: len(completion)]
        assert shard.tokens(row).tolist() == completion.tolist()
