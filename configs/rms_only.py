"""CT-CLIP with RMSNorm. Takes `scale=tiny|small|paper` after a colon."""

from jaxablate.config import named_arm

get_config = named_arm(__file__, "ctclip.py", arm="rms_only")
