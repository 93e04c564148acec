"""The adversarial loss."""

import torch

from tadsr.training.losses import PatchDiscriminator, discriminator_loss, generator_loss


def test_the_discriminator_learns_to_tell_two_kinds_apart():
    torch.manual_seed(0)
    discriminator = PatchDiscriminator(width=8)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=2e-3)

    def draw():
        noise = torch.randn(4, 3, 32, 32)
        return noise, torch.nn.functional.avg_pool2d(noise, 3, 1, 1)

    for _ in range(40):
        real, fake = draw()
        loss = discriminator_loss(discriminator(real), discriminator(fake)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fake = draw()
    assert discriminator(real).shape == (4, 1, 4, 4)
    assert generator_loss(discriminator(fake)).mean() > generator_loss(discriminator(real)).mean()
    assert loss < 0.9


def test_hinge_losses_stop_where_the_scores_are_clear():
    real, fake = torch.full((2, 1, 3, 3), 2.0), torch.full((2, 1, 3, 3), -2.0)
    assert discriminator_loss(real, fake).tolist() == [0, 0]
    assert discriminator_loss(fake, real).tolist() == [3, 3]
    assert generator_loss(real).tolist() == [-2, -2]
