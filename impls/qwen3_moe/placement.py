"""Who holds what: where one rank of a model stands, and which part of each dimension is its own.

    tensor      heads, intermediate columns and the vocabulary are cut over all ranks; every rank sees all tokens
    experts     one rank holds an expert whole (expert parallel), or `expert_shards` neighbouring ranks hold its columns
    data        attention, dense layers and the vocabulary are whole on every rank, which has tokens of its own

Ranks are numbered experts first: rank r belongs to the expert rank r // expert_shards and holds the part
r % expert_shards of the columns of the experts there.
"""

from dataclasses import dataclass

VOCABULARY_UNIT = 4  # shards begin at multiples of it: a random number of the sampler serves four neighbours


@dataclass(frozen=True)
class Placement:
    """One rank's place.

    Args:
        expert_parallel: ranks hold whole experts, or shares of them, instead of columns of all of them.
        expert_shards: ranks that share the columns of an expert under expert parallelism.
        copies: experts that a second rank holds too, the first ones first.
        split_tokens: each rank runs the router and the shared expert for its share of the tokens, with whole weights.
        data_parallel: ranks have different tokens; everything but the experts is whole on each.

    Raises:
        ValueError: numbers that do not go together.
    """

    rank: int = 0
    world_size: int = 1
    expert_parallel: bool = False
    expert_shards: int = 1
    copies: int = 0
    split_tokens: bool = False
    data_parallel: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank is {self.rank}, wanted one of 0..{self.world_size - 1}")
        if self.expert_shards < 1 or self.world_size % self.expert_shards:
            raise ValueError(f"expert_shards is {self.expert_shards}, wanted a divisor of the {self.world_size} ranks")
        if not self.expert_parallel and (self.expert_shards > 1 or self.copies or self.data_parallel):
            raise ValueError(
                "expert_shards, copies and data_parallel need expert_parallel=True; without it every expert is cut "
                "over all ranks"
            )
        if self.copies < 0 or (self.copies and self.expert_ranks == 1):
            raise ValueError(f"copies is {self.copies}, wanted 0 or more, and 0 where one rank holds all experts")

    @property
    def tensor(self) -> tuple[int, int]:
        """This rank's number among those that share a matrix, and how many those are."""
        return (0, 1) if self.data_parallel else (self.rank, self.world_size)

    @property
    def shared_expert(self) -> tuple[int, int]:
        """The same for the shared expert, which whoever runs it for own tokens alone holds whole."""
        return (0, 1) if self.split_tokens else self.tensor

    @property
    def columns(self) -> tuple[int, int]:
        """The same for the columns of an expert."""
        if not self.expert_parallel:
            return self.rank, self.world_size
        return self.rank % self.expert_shards, self.expert_shards

    @property
    def expert_rank(self) -> int:
        return self.rank // self.expert_shards

    @property
    def expert_ranks(self) -> int:
        return self.world_size // self.expert_shards

    def owner(self, num_experts: int) -> list[int]:
        """The expert rank of each physical expert: runs of neighbours, and each copy on a rank after the original's."""
        owner = [e * self.expert_ranks // num_experts for e in range(num_experts)]
        if self.copies > num_experts * (self.expert_ranks - 1):
            raise ValueError(
                f"copies is {self.copies}, wanted at most {num_experts * (self.expert_ranks - 1)}: no rank holds an "
                f"expert twice"
            )
        for i in range(self.copies):
            owner.append((owner[i % num_experts] + 1 + i // num_experts) % self.expert_ranks)
        return owner

    def logical(self, num_experts: int) -> list[int]:
        """The expert that each physical expert is a copy of."""
        return [*range(num_experts), *(i % num_experts for i in range(self.copies))]

    def held(self, num_experts: int) -> list[int]:
        """The experts of this rank in the order of their local numbers."""
        if not self.expert_parallel or not num_experts:
            return list(range(num_experts))
        if num_experts < self.expert_ranks:
            raise ValueError(
                f"num_experts is {num_experts}, wanted at least one for each of {self.expert_ranks} ranks; use fewer "
                f"ranks, expert_shards, or expert_parallel=False"
            )
        places = zip(self.logical(num_experts), self.owner(num_experts), strict=True)
        return [expert for expert, rank in places if rank == self.expert_rank]

    def vocabulary(self, size: int, rank: int) -> range:
        """The tokens of `rank` among those that share the vocabulary: equal runs, the last ones shorter."""
        ranks = self.tensor[1]
        share = -(-size // (VOCABULARY_UNIT * ranks)) * VOCABULARY_UNIT if ranks > 1 else size
        return range(min(rank * share, size), min((rank + 1) * share, size))
