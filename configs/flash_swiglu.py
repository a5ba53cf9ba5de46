"""CT-CLIP with flash attention and SwiGLU. Takes `scale=tiny|small|paper` after a colon."""

from jaxablate.config import named_arm

get_config = named_arm(__file__, "ctclip.py", arm="flash_swiglu")
