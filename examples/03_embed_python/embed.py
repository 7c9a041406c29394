"""All functions of the runtime, in the order in which an application might use them."""

import numpy as np

import tarflow_runtimes as tfr


def show_progress(step: tfr.Step) -> bool:
    if step.step == step.total:
        print(f"sampled in {step.total} steps")
    return True


def stop_halfway(step: tfr.Step) -> bool:
    return step.step < step.total // 2


with tfr.load() as flow:  # the shipped digits; tfr.load("my.tarflow") for another bundle
    print(f"{flow.config.classes} classes on {flow.engine_name}")

    out = flow.sample(10, labels=list(range(10)), seed=0, guidance=2.0, on_step=show_progress)
    out.save("digits.png")
    print(f"images {out.images.shape} in [{out.images.min():.2f}, {out.images.max():.2f}], seed {out.seed}")

    try:
        flow.sample(10, seed=0, on_step=stop_halfway)
    except tfr.Cancelled:
        print("cancelled; the flow stays usable")

    labels = list(range(10))
    print("bits/dim:", np.round(flow.bits_per_dim(out.images, labels=labels), 2))
    print("classes: ", flow.classify(out.images).argmax(axis=1))

    latents, log_det = flow.encode(out.images, labels=labels)
    back = flow.decode(latents, labels=labels)
    print(f"round trip: {np.abs(back - out.images).max():.1e}")

    rng = np.random.default_rng(0)
    noisy = out.images + flow.config.noise_std * rng.standard_normal(out.images.shape, dtype=np.float32)
    clean = flow.denoise(noisy, labels=labels)
    before, after = (float(np.square(x - out.images).mean()) for x in (noisy, clean))
    print(f"denoised: mean square error {before:.4f} -> {after:.4f}")
