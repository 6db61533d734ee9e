// The tensors of an optimizer, held from step to step, so that a step hands over nothing but its gradients: part of
// adamw.cpp. With hundreds of small tensors the lists of the ops cost more than the arithmetic.
//
// Addresses and layouts are read anew in every step (`p.data = ...` moves a tensor that is held); whether the held tensors
// are still the optimizer's is for Python to say.

class AdamWPlan {
 public:
  AdamWPlan() : id_(plans().add(this)) {}
  ~AdamWPlan() { plans().remove(id_); }
  AdamWPlan(const AdamWPlan&) = delete;
  AdamWPlan& operator=(const AdamWPlan&) = delete;

  std::int64_t id() const { return id_; }

  static AdamWPlan& of(std::int64_t id) { return *plans().find(id); }

  void hold(Lists lists, std::vector<Item> items) {
    lists_ = std::move(lists);
    items_ = std::move(items);
    chunks_.clear();
    bound_ = false;
  }

  // Reads all addresses. False, and nothing to be done with this plan, where a tensor's type or layout is no longer what
  // it was or not what the kernels take. The caller keeps the gradients alive until the step's end.
  bool bind(const std::vector<Tensor>& grads) {
    bound_ = false;
    if (grads.size() != items_.size()) return false;
    for (std::size_t t = 0; t < items_.size(); ++t) {
      const Item before = items_[t];
      if (describe(lists_.of(t, grads[t]), items_[t]) != nullptr) return false;
      if (!chunks_.empty() && (items_[t].numel != before.numel || items_[t].storage != before.storage || items_[t].wide != before.wide)) return false;
    }
    if (chunks_.empty()) chunks_ = chunks_of(items_);
    return bound_ = true;
  }

  double norm() const {
    check_bound();
    return norm_of(items_, chunks_);
  }

  void update(const std::vector<std::array<double, 7>>& terms, double multiplier, std::int64_t seed, bool zero_grads) {
    check_bound();
    std::vector<Terms> rows(terms.size());
    for (std::size_t i = 0; i < rows.size(); ++i) std::memcpy(&rows[i], terms[i].data(), sizeof(Terms));
    for (const Item& item : items_)
      if (item.group >= static_cast<std::int64_t>(rows.size())) throw std::invalid_argument("AdamWPlan: a parameter's group has no terms");
    update_all(items_, chunks_, rows, static_cast<float>(multiplier), seed, zero_grads);
    bound_ = false;
  }

  void zero() {
    check_bound();
    fasttrain::zero(items_);
    bound_ = false;
  }

 private:
  // Ops take numbers, not objects.
  struct Plans {
    std::mutex mutex;
    std::unordered_map<std::int64_t, AdamWPlan*> alive;
    std::int64_t next = 0;

    std::int64_t add(AdamWPlan* plan) {
      const std::lock_guard<std::mutex> lock(mutex);
      alive.emplace(next, plan);
      return next++;
    }
    void remove(std::int64_t id) {
      const std::lock_guard<std::mutex> lock(mutex);
      alive.erase(id);
    }
    AdamWPlan* find(std::int64_t id) {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto found = alive.find(id);
      STD_TORCH_CHECK(found != alive.end(), "adamw: there is no plan ", id);
      return found->second;
    }
  };
  static Plans& plans() {
    static Plans all;
    return all;
  }

  void check_bound() const {
    if (!bound_) throw std::logic_error("AdamWPlan: bind gradients first; they serve one step");
  }

  const std::int64_t id_;
  Lists lists_;
  std::vector<Item> items_;
  std::vector<Chunk> chunks_;
  bool bound_ = false;
};

void adamw_plan(std::int64_t plan, const std::vector<Tensor>& params, const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& scales, const std::vector<Tensor>& steps, const std::vector<Tensor>& emas,
                const std::vector<Tensor>& remainders, const Tensor& places) {
  Lists lists{params, exp_avgs, exp_avg_sqs, scales, steps, emas, remainders};
  check_lengths(lists);
  std::vector<Item> items = items_at(places, params.size());
  AdamWPlan::of(plan).hold(std::move(lists), std::move(items));
}

bool adamw_bind(std::int64_t plan, const std::vector<Tensor>& grads) { return AdamWPlan::of(plan).bind(grads); }
