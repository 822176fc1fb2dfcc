"""VariBAD (Zintgraf et al. 2020): a belief over tasks, learned by reconstructing whole trials, tells the policy what it
knows so far.

An encoder gives q(m | τ_:t) = N(μ_t, exp(logvar_t)) at each step t of a trial. PPO trains the policy's head alone, on
(s_t, μ_t, logvar_t); encoder and decoders learn from recent trials, by the ELBO alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint, loop
from torch import Tensor, nn
from torch.nn import functional as F

from trmrl.config import Config
from trmrl.model import GaussianHead, Policy, Sizes, Trials, check_count, over, while_going

EMBEDDED_STATE, EMBEDDED_ACTION, EMBEDDED_REWARD = 32, 16, 16
DECODER_HIDDEN = (64, 32)
MINIBATCH = 25
"""Trials of a gradient step."""
LONG, TERMS = 100, 50
"""Of a trial of more than LONG steps, each gradient step draws TERMS at random for the ELBO's sum over t."""
TRANSITIONS = 400
"""Of a trial of more transitions, each gradient step draws so many to reconstruct (memory: trials × t's × these)."""
PLACE = 4
"""Of this module's randomness, beside those of :mod:`trmrl.ppo` (0 to 3)."""


def gaussian_kl(mean: Tensor, logvar: Tensor, prior_mean: Tensor, prior_logvar: Tensor) -> Tensor:
    """KL(N(mean, e^logvar) ‖ N(prior_mean, e^prior_logvar)) of diagonal Gaussians (…, latent): (…)."""
    ratio = logvar - prior_logvar
    return 0.5 * (ratio.exp() - ratio - 1 + (mean - prior_mean).square() * (-prior_logvar).exp()).sum(-1)


class Encoder(nn.Module):
    """A GRU over embedded (s_t, a_{t−1}, r_{t−1}), and linear layers to μ_t and logvar_t.

    At the first step of a trial nothing has been seen: the belief there is what the output layers say of the hidden
    state 0, whatever s_0 is. The first step of a later episode is fed like any other, with a = 0 and r = 0. After an
    episode's end the belief stays as it was until the next one.
    """

    def __init__(
        self, sizes: Sizes, width: int, latent: int, mask_reward: bool = False, mask_action: bool = False
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.state, self.action = nn.Linear(sizes.observation, EMBEDDED_STATE), nn.Linear(sizes.action, EMBEDDED_ACTION)
        self.reward = nn.Linear(1, EMBEDDED_REWARD)
        self.gru = nn.GRU(EMBEDDED_STATE + EMBEDDED_ACTION + EMBEDDED_REWARD, width, batch_first=True)
        for name, value in self.gru.named_parameters():
            if name.startswith("bias"):
                nn.init.zeros_(value)
            else:
                nn.init.orthogonal_(value)
        self.mean, self.logvar = nn.Linear(width, latent), nn.Linear(width, latent)
        self.action_shown, self.reward_shown = float(not mask_action), float(not mask_reward)

    def embed(self, token: Tensor) -> Tensor:
        """Tokens (…, D) → what the GRU takes (…, 64). The token's last number, d_{t−1}, is left out."""
        state, action, reward = _parts(token, self.sizes)
        action, reward = self.action(action * self.action_shown), self.reward(reward * self.reward_shown)
        return F.relu(torch.cat([self.state(state), action, reward], -1))

    def belief(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states (…, width) → μ and logvar (…, latent)."""
        return self.mean(hidden), self.logvar(hidden)

    def forward(self, tokens: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of whole trials (n, L, D), as far as valid (n, L) → μ and logvar (n, L, latent) at each step."""

        def hidden(tokens: Tensor) -> Tensor:
            first = tokens.new_zeros(len(tokens), 1, self.gru.hidden_size)
            if tokens.shape[1] == 1:
                return first
            return torch.cat([first, self.gru(self.embed(tokens[:, 1:]))[0]], 1)

        return self.belief(while_going(hidden, tokens, valid))


class Decoder(nn.Module):
    """The mean of p(r_{i+1} | s_i, a_i, s_{i+1}, m) or, without the next state, of p(s_{i+1} | s_i, a_i, m)."""

    def __init__(self, sizes: Sizes, latent: int, output: int, next_state: bool) -> None:
        super().__init__()
        self.latent, self.next_state = latent, next_state
        self.state, self.action = nn.Linear(sizes.observation, EMBEDDED_STATE), nn.Linear(sizes.action, EMBEDDED_ACTION)
        width = latent + EMBEDDED_STATE * (1 + next_state) + EMBEDDED_ACTION
        self.first = nn.Linear(width, DECODER_HIDDEN[0])
        self.rest = nn.Sequential(nn.Linear(*DECODER_HIDDEN), nn.ReLU(), nn.Linear(DECODER_HIDDEN[1], output))

    def forward(self, m: Tensor, state: Tensor, action: Tensor, following: Tensor) -> Tensor:
        """Every transition of a trial from every one of its samples.

        Args:
            m: (n, k, latent).
            state, action, following: s_i (n, j, S), a_i (n, j, A), s_{i+1} (n, j, S).

        Returns:
            (n, k, j, output).
        """
        parts = [F.relu(self.state(state)), F.relu(self.action(action))]
        if self.next_state:
            parts.append(F.relu(self.state(following)))
        # W·[m ; x] = W_m·m + W_x·x: the first layer is worked out for k samples and j transitions, not for k × j pairs
        of_sample = F.linear(m, self.first.weight[:, : self.latent])
        of_transition = F.linear(torch.cat(parts, -1), self.first.weight[:, self.latent :], self.first.bias)
        found: Tensor = self.rest(F.relu(of_sample[:, :, None] + of_transition[:, None]))
        return found


class BeliefModel(nn.Module):
    """Encoder and decoders, and the two parts of their ELBO."""

    def __init__(self, sizes: Sizes, config: Config) -> None:
        super().__init__()
        self.sizes = sizes
        self.encoder = Encoder(sizes, config.d_model, config.latent, config.mask_reward, config.mask_action)
        self.reward = Decoder(sizes, config.latent, 1, next_state=True)
        self.state = Decoder(sizes, config.latent, sizes.observation, next_state=False) if config.decode_state else None

    def forward(
        self, tokens: Tensor, valid: Tensor, terms: Tensor, transitions: Tensor, noise: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """−ELBO of n trials in two parts, Σ_t Σ_i ‖x_i − x̂_i(m_t)‖² and Σ_t KL(q_t ‖ q_{t−1}), where m_t ~ q_t and
        q_{−1} = N(0, I).

        i runs over the transitions of the whole trial, past and future; x is the reward and, with a state decoder, the
        next observation, of which the mean over its numbers is taken. As in the authors' code the square has no ½.
        Of each episode the last transition is left out, as trials do not hold the observation after it; what is not
        valid counts neither as t nor as i. Sums over some t's and i's are scaled up to all.

        Args:
            tokens: (n, E, T, D).
            valid: (n, E, T).
            terms: (n, k), the t's, of ET.
            transitions: (n, j), the i's, of E(T − 1).
            noise: (n, k, latent), standard normal.

        Returns:
            Reconstruction error (n,), KL (n,), and the standard deviations of the last belief (n, latent).
        """
        _, episodes, steps = valid.shape
        mean, logvar = self.encoder(tokens.flatten(1, 2), valid.flatten(1))
        before = [F.pad(part[:, :-1], (0, 0, 1, 0)) for part in (mean, logvar)]  # N(0, I) comes first
        weight = _rows(valid.flatten(1), terms) * (episodes * steps / terms.shape[1])
        kl = (_rows(gaussian_kl(mean, logvar, *before), terms) * weight).sum(1)

        m = _rows(mean, terms) + (0.5 * _rows(logvar, terms)).exp() * noise
        # the token after a step holds all that came of it: s_{i+1}, a_i and r_i
        state = _rows(tokens[:, :, :-1, : self.sizes.observation].flatten(1, 2), transitions)
        after = _rows(tokens[:, :, 1:].flatten(1, 2), transitions)
        following, acted, reward = _parts(after, self.sizes)
        error = (self.reward(m, state, acted, following) - reward[:, None]).square().mean(-1)
        if self.state is not None:
            error = error + (self.state(m, state, acted, following) - following[:, None]).square().mean(-1)
        of_all = episodes * (steps - 1) / max(transitions.shape[1], 1)
        happened = _rows(valid[:, :, :-1].flatten(1), transitions) * of_all
        reconstruction = torch.einsum("nkj,nk,nj->n", error, weight, happened)
        return reconstruction, kl, (0.5 * logvar[:, -1]).exp()


def _parts(token: Tensor, sizes: Sizes) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (…, D) → s_t (…, S), a_{t−1} (…, A), r_{t−1} (…, 1)."""
    end = sizes.observation + sizes.action
    return token[..., : sizes.observation], token[..., sizes.observation : end], token[..., end : end + 1]


def _rows(values: Tensor, places: Tensor) -> Tensor:
    """(n, L, …) at places (n, k): (n, k, …)."""
    return values[torch.arange(len(values), device=values.device)[:, None], places]


class VariBADPolicy(Policy):
    """A Gaussian head on [s_t ; μ_t ; logvar_t]; the belief lives on from one episode of a trial to the next.

    Encoder and decoders are parts of the policy, so that they are saved with it.
    """

    by_trial = True

    def __init__(self, sizes: Sizes, config: Config) -> None:
        super().__init__()
        self.sizes = sizes
        self.belief = BeliefModel(sizes, config)
        # PPO trains what requires gradients when its learner is made, which is to be the head alone: the policy's loss
        # does not shape the belief. BeliefLearner switches gradients on while it takes its own steps.
        self.belief.requires_grad_(False)
        width = sizes.observation + 2 * config.latent
        self.head = GaussianHead([width, *config.head_hidden, sizes.action], config.output_gain, config.init_std)
        self._state: Tensor | None = None
        self._seen = False

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        encoder = self.belief.encoder
        self._state = torch.zeros(1, count, encoder.gru.hidden_size, device=encoder.mean.weight.device)
        self._seen = False

    def memory(self, token: Tensor) -> Tensor:
        """Take the newest tokens (count, D); [s_t ; μ_t ; logvar_t] (count, S + 2·latent)."""
        if self._state is None:
            self.reset(len(token))
        assert self._state is not None
        check_count(token, self._state.shape[1])
        encoder = self.belief.encoder
        if self._seen:  # the first token of a trial comes before any transition
            new = encoder.gru(encoder.embed(token)[:, None], self._state)[1]
            self._state = torch.where(over(token)[:, None], self._state, new)
        self._seen = True
        return self._shown(token, *encoder.belief(self._state[0]))

    def features(self, trials: Trials, index: Tensor) -> Tensor:
        """``index`` holds whole trials, one after the other."""
        rows = index[:: trials.length] // trials.length
        tokens, valid = trials.tokens[rows].flatten(1, 2), trials.valid[rows].flatten(1)
        return self._shown(tokens, *self.belief.encoder(tokens, valid)).flatten(0, 1)

    def _shown(self, token: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        return torch.cat([token[..., : self.sizes.observation], mean.detach(), logvar.detach()], -1)


class BeliefLearner:
    """Trains encoder and decoders on the last trials, which it keeps.

    Args:
        config: what to train.
        policy: whose belief is trained.
        accelerator: of this process. Every process keeps all trials and takes its share of each minibatch.
    """

    def __init__(self, config: Config, policy: VariBADPolicy, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.model = config, accelerator, policy.belief
        self.parameters = list(self.model.parameters())
        self.optimizer = torch.optim.Adam(self.parameters, lr=config.vae_lr, fused=True)
        shape = config.vae_trials, config.episodes, config.horizon
        # a ring on the CPU; tokens hold actions and rewards, too, each with the step after
        self.tokens, self.valid = torch.zeros(*shape, policy.sizes.token), torch.zeros(shape, dtype=torch.bool)
        self.count = torch.zeros((), dtype=torch.long)  # of all trials so far

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs besides the policy."""
        ring = checkpoint.TensorState(tokens=self.tokens, valid=self.valid, count=self.count)
        return {"belief_optimizer": self.optimizer, "belief_buffer": ring}

    def step(self, trials: Trials, update: int) -> dict[str, Tensor]:
        """Keep the trials, and take `vae_steps` gradient steps on minibatches of what is kept.

        Args:
            trials: of all processes.
            update: from which, with the seed, all randomness derives.

        Returns:
            Means over the gradient steps (nothing if there are none) of: elbo_loss (−ELBO of a trial, reconstruction +
            kl_weight · belief_kl), reconstruction (Σ_t Σ_i of squared errors), belief_kl (Σ_t), belief_std (in the end
            of trials).
        """
        self._keep(trials)
        if not self.config.vae_steps:
            return {}
        with self._learning():
            rows = torch.stack([self._gradient_step(update, done) for done in range(self.config.vae_steps)])
        found = rows.mean(0)
        if self.accelerator.num_processes > 1:
            found = self.accelerator.reduce(found, reduction="sum")
        reconstruction, kl, std = found
        return {
            "elbo_loss": reconstruction + self.config.kl_weight * kl, "reconstruction": reconstruction,
            "belief_kl": kl, "belief_std": std,
        }  # fmt: skip

    def _keep(self, trials: Trials) -> None:
        size, new = len(self.tokens), len(trials.tokens)
        places = ((self.count + torch.arange(new)) % size)[-size:]  # of more than fit, the last
        self.tokens[places] = trials.tokens[-size:].to("cpu", self.tokens.dtype)
        self.valid[places] = trials.valid[-size:].cpu()
        self.count += new

    @contextlib.contextmanager
    def _learning(self) -> Iterator[None]:
        """Gradients of encoder and decoders are on in here alone, and leave nothing behind."""
        self.model.requires_grad_(True)
        try:
            yield
        finally:
            self.optimizer.zero_grad()
            self.model.requires_grad_(False)

    def _gradient_step(self, update: int, done: int) -> Tensor:
        """One step of Adam; this process's parts of reconstruction, KL and standard deviation (3,)."""
        config, device = self.config, self.accelerator.device
        rng = np.random.default_rng([config.seed, update, PLACE, done])
        kept = min(int(self.count), len(self.tokens))
        rows = rng.permutation(kept)[:MINIBATCH]
        # every process draws for the whole minibatch, so that how it is shared makes no difference
        length = config.episodes * config.horizon
        terms = _some(rng, len(rows), length, TERMS if length > LONG else length)
        transitions = _some(rng, len(rows), config.episodes * (config.horizon - 1), TRANSITIONS)
        noise = rng.standard_normal((len(rows), terms.shape[1], config.latent), dtype=np.float32)
        self.optimizer.zero_grad()
        sums = torch.zeros(3, device=device)
        for mine in loop.share(torch.arange(len(rows)), self.accelerator):
            kept_rows = torch.from_numpy(rows)[mine]
            drawn = [torch.from_numpy(part)[mine].to(device) for part in (terms, transitions, noise)]
            found = self.model(self.tokens[kept_rows].to(device), self.valid[kept_rows].to(device), *drawn)
            reconstruction, kl, std = found[0].sum(), found[1].sum(), found[2].mean(-1).sum()
            ((reconstruction + config.kl_weight * kl) / len(rows)).backward()
            sums = torch.stack([reconstruction, kl, std]).detach() / len(rows)
        loop.sum_gradients(self.parameters, self.accelerator)
        self.optimizer.step()
        return sums


def _some(rng: np.random.Generator, rows: int, of: int, most: int) -> np.ndarray:
    """For each row up to ``most`` different places (rows, …) out of ``of``; all, in order, if there are no more."""
    if of <= most:
        return np.tile(np.arange(of), (rows, 1))
    return rng.random((rows, of)).argsort(axis=1, kind="stable")[:, :most]
