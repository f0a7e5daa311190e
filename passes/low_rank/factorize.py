import torch


def best_factors(w, rank, method="auto", seed=0):
    if method == "randomized":
        g = torch.Generator().manual_seed(seed)
        q = min(rank + 10, *w.shape)
        Q = torch.linalg.qr(w @ torch.randn(w.size(1), q, generator=g))[0]
        for _ in range(2):
            Q = torch.linalg.qr(w.T @ Q)[0]
            Q = torch.linalg.qr(w @ Q)[0]
        u, s, v = torch.linalg.svd(Q.T @ w, full_matrices=False)
        u = Q @ u
    else:
        u, s, v = torch.linalg.svd(w.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]).float(), v[:rank].float()
