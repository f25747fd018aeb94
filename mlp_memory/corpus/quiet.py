"""TensorFlow without its notices."""

import os


def quiet_tensorflow() -> None:
    """To be called before TensorFlow is imported: its errors are raised, its notices only hide ours.

    What a user set stays; "1" is what JAX sets where nobody did.
    """
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") == "1":
        os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
